"""The notebook runs from its first cell to its last, on a tiny model."""

from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

from tests.tiny import import_path, tiny_ppo_config

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def outputs_of(notebook, kind=None):
    return [
        o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if kind in (None, o.output_type)
    ]


def test_it_runs_headless(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text("def length(outputs, **_):\n    return [len(set(o)) / 6 for o in outputs]\n")
    values = tiny_ppo_config(tiny_folder).to_dict()
    values["data"] = {"prompts": ["a film", "another film"], "eval_repeats": 8}
    values["reward"] = {"function": f"{tmp_path / 'reward.py'}:length"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("SOLOTUNE_RECIPE", str(tmp_path / "tiny.yaml"))
    monkeypatch.setenv("PYTHONPATH", import_path())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = "".join(output.text for output in outputs_of(notebook, "stream"))
    assert "2 rounds of 8 rollouts" in texts
    assert "Trainable" in texts
    assert "after" in texts
    curves = [o for o in outputs_of(notebook) if "image/png" in o.get("data", {})]
    assert len(curves) == 1, "one figure, drawn anew after every round"
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_the_outputs_in_it_are_of_a_run(tmp_path):
    """What a reader sees without running it: every code cell was executed, in order, and none failed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not outputs_of(notebook, "error")
    assert any("image/png" in o.get("data", {}) for o in outputs_of(notebook))
