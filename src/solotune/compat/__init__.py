"""Scripts written for other libraries, run unchanged on this one."""
