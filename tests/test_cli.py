"""The command: what it calls with what, how it says an error, and how it ends."""

import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from solotune import cli
from solotune.config import DataConfig, Recipe, RewardConfig, default_ppo_config, describe_steps, packaged
from solotune.errors import DataError, ModelError, RewardError

TRAINING = {"base": "encoder", "data": "asset:film-snippets", "seed": 7}


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """A folder of packaged recipes with a quickstart of ours."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = Recipe(default_ppo_config(), DataConfig(["a"]), RewardConfig(training=TRAINING))
    recipe.save_yaml(folder / "quickstart.yaml")
    monkeypatch.setattr(packaged, "RECIPE_FOLDERS", (tmp_path / "not there", folder))
    return folder


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What the commands call, in place of the modules that do the work; `calls.raises` is raised by them."""

    class Calls(list):
        raises: BaseException | None = None

        def record(self, *arguments, **_):
            self.append(arguments)
            if self.raises:
                raise self.raises
            return Path("somewhere")

    recorded = Calls()
    for module, name in (
        ("solotune.runs.start", "run_recipe"),
        ("solotune.rewards.training", "train_reward_model"),
        ("solotune.report.page", "write_report"),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, recorded.record)
        monkeypatch.setitem(sys.modules, module, stand_in)
    return recorded


def test_a_run_is_called_after_its_recipe(recipes, calls):
    assert invoke("train", "quickstart", "--set", "train.seed=3", "--set", "method.lam=1e-1").exit_code == 0
    ((recipe, out, resume),) = calls
    assert (out, resume) == (Path("runs/quickstart"), False)
    assert recipe.config.train.run_name == "quickstart"
    assert (recipe.config.train.seed, recipe.config.method.lam) == (3, 0.1)


def test_a_recipe_is_a_file_or_a_name_and_a_run_may_lie_elsewhere(recipes, calls, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((recipes / "quickstart.yaml").read_text())
    assert invoke("train", str(mine), "--resume").exit_code == 0
    assert invoke("train", str(mine), "--out", "elsewhere").exit_code == 0
    assert (
        invoke("train", str(mine), "--set", "train.run_name=named", "--set", "train.checkpoint_dir=top").exit_code == 0
    )
    assert [call[1:] for call in calls] == [
        (Path("runs/mine"), True),
        (Path("elsewhere"), False),
        (Path("top/named"), False),
    ]


def test_quickstart_is_the_packaged_recipe_with_rounds_and_seed(recipes, calls):
    assert invoke("quickstart").exit_code == 0
    assert invoke("quickstart", "--rounds", "1000", "--seed", "5", "--out", "q").exit_code == 0
    (plain, plain_out, _), (changed, changed_out, resume) = calls
    assert (plain_out, changed_out, resume) == (Path("runs/quickstart"), Path("q"), False)
    assert plain.config.train.seed == default_ppo_config().train.seed
    assert (changed.config.train.epochs, changed.config.train.seed) == (1000, 5)
    assert cli.describe_steps(changed.config).rounds == 1000
    assert changed.reward.training.seed == plain.reward.training.seed == 7


def test_a_packaged_recipe_ends_with_what_to_do_next(recipes, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("quickstart", "--out", "q").stdout == "", "nothing was left there"
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "report.html").touch()
    for arguments in (["quickstart"], ["train", "quickstart"]):
        said = invoke(*arguments, "--out", "q").stdout
        assert "open q/report.html" in said
        assert "solotune export q --merge DIR" in said
        assert '"Your own reward"' in said
    (tmp_path / "mine.yaml").write_text((recipes / "quickstart.yaml").read_text())
    assert invoke("train", "mine.yaml", "--out", "q").stdout == ""


def test_reward_trains_the_reward_model(recipes, calls):
    result = invoke("reward", "quickstart", "--set", "reward.training.epochs=2")
    assert result.exit_code == 0
    assert result.stdout == "saved in somewhere\n"
    ((training,),) = calls
    assert (training.base, training.epochs, training.seed) == ("encoder", 2, 7)


def test_reward_needs_something_to_train(recipes, calls):
    changes = ["reward.training=null", "reward.function=f.py:g", "reward.transform=null"]
    result = invoke("reward", "quickstart", *(word for change in changes for word in ("--set", change)))
    assert result.exit_code == 2
    assert "reward.training is not given" in result.stderr
    assert not calls


def test_report_takes_the_folder_of_a_run(calls, tmp_path):
    assert invoke("report", str(tmp_path)).stdout == "somewhere\n"
    assert calls == [(tmp_path,)]
    result = invoke("report", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "no run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "quickstrat"],
            "no recipe quickstrat: neither a file nor a packaged recipe; did you mean quickstart?",
        ),
        (
            ["train", "quickstart", "--set", "train.sead=1"],
            "unknown setting train.sead in section train: did you mean seed?",
        ),
        (["tree", "quickstart", "--set", "train.seed=x"], "train.seed = 'x': must be a whole number"),
    ],
)
def test_a_wrong_setting_is_one_message_and_exit_code_2(recipes, calls, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not calls


@pytest.mark.parametrize("error", [DataError("no prompts"), ModelError("no model"), RewardError("NaN")])
def test_other_errors_for_the_person_have_exit_code_1(recipes, calls, error):
    calls.raises = error
    result = invoke("train", "quickstart")
    assert result.exit_code == 1
    assert result.stderr == f"error: {error}\n"


def test_ctrl_c_exits_with_130(recipes, calls):
    calls.raises = KeyboardInterrupt()
    result = invoke("train", "quickstart")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_an_error_of_ours_keeps_its_traceback(recipes, calls):
    calls.raises = AssertionError("a bug")
    with pytest.raises(AssertionError, match="a bug"):
        invoke("train", "quickstart")


def test_version_is_the_package_s():
    from importlib.metadata import version

    assert invoke("--version").stdout == f"solotune {version('solotune')}\n"


def test_packaged_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packaged.find_recipe("opt-1.3b-imdb").is_file()


def test_the_quickstarts_settings_serve_a_reward_of_ones_own():
    import solotune

    config = solotune.quickstart_config(rounds=3)
    assert config.train.epochs == 3
    assert config.model.model_path == config.tokenizer.tokenizer_path == "asset:smollm2-135m-instruct"
    assert describe_steps(config).rounds == 3


def test_tree_of_the_classic_recipe_counts_what_trains():
    result = invoke("tree", "opt-1.3b-imdb")
    assert result.exit_code == 0
    *_, trainable, value_head = result.stdout.splitlines()
    assert trainable == "Trainable 262,144 of 1,316,020,224 parameters (0.0199 %)"
    assert value_head == "Value head: 8,396,801 trainable"
