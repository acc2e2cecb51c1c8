import logging

# Where it is installed, peft imports it, and on a CPU it tells of kernels it has not got, and of every 8-bit product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
