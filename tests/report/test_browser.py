"""The page in a real browser: hostile texts run nothing there, with the page's policy and without it."""

import json
import re
import shutil
import subprocess

import pytest

from solotune.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
]
OWNED = "document.title='owned';document.body.dataset.owned=1;console.error('owned')"
ATTACKS = [
    f"<script>{OWNED}</script>",
    f"</pre></td></table></svg><script>{OWNED}</script>",
    f'<img src=x onerror="{OWNED}">',
    f'" onmouseover="{OWNED}" autofocus onfocus=\'{OWNED}\' x="',
    f"</style><svg onload={OWNED}>",
    f"</title><script>{OWNED}</script>",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="headless Chromium is not installed (chromium, google-chrome)"),
]


def dump_dom(path, profile) -> tuple[str, list[str]]:
    """(the DOM after scripts had their chance, what the page wrote to the console)."""
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def attacked(make_run, rewrite):
    run = make_run("quickstart")
    samples = iter(range(10_000))

    def attack(sample: dict) -> dict:
        text = ATTACKS[next(samples) % len(ATTACKS)]
        return sample | {"prompt": text, "output": text}

    rewrite(run / "samples.jsonl", attack)
    rewrite(run / "metrics.jsonl", lambda m: m | {ATTACKS[0] + "/loss": 1.0})
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"model": ATTACKS[5], "parameter_tree": ATTACKS[1], "seconds_by_phase": {ATTACKS[4]: 1.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(ATTACKS[1])
    return write_report(run)


def test_the_page_opens_without_a_word_on_the_console(attacked, tmp_path):
    dom, console = dump_dom(attacked, tmp_path / "profile")
    assert "<title>quickstart · solotune run</title>" in dom
    assert console == []


def test_escaping_alone_stops_every_attack(attacked, tmp_path):
    html = attacked.read_text(encoding="utf-8")
    bare = attacked.with_name("bare.html")
    bare.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html), encoding="utf-8")
    dom, console = dump_dom(bare, tmp_path / "profile")
    assert "<title>quickstart · solotune run</title>" in dom
    assert "data-owned" not in dom
    assert "<script" not in dom
    assert "<img" not in dom
    assert console == []


def test_this_test_would_see_an_attack(attacked, tmp_path):
    """The other two prove something only if the browser runs such a text where it is not escaped."""
    bare = attacked.with_name("unsafe.html")
    bare.write_text(f"<title>quickstart</title><body>{ATTACKS[0]}</body>", encoding="utf-8")
    dom, console = dump_dom(bare, tmp_path / "profile")
    assert "<title>owned</title>" in dom
    assert console
