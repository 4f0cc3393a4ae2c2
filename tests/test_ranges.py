import importlib
import math
import pathlib

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from jvdit.machine import flag_parser
from jvdit.ranges import RANGES, check_ranges, range_of

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def stages(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    return config.stages.values() if "stages" in config else [config]


def flat(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_every_config_has_a_range_and_lies_in_it(name):
    for stage in stages(name):
        check_ranges(stage.to_dict())
        for setting, value in flat(stage):
            first = value[0] if isinstance(value, tuple) and value else value
            if isinstance(first, int | float) and not isinstance(first, bool):
                assert range_of(setting) is not None, setting


@pytest.mark.parametrize(
    "name, value",
    [
        ("loss.mse", -1.0),
        ("loss.kl", math.nan),
        ("vae.encoder_width", 0),
        ("patch_size", (0, 1, 1)),
        ("dit.dtype", "foo"),
        ("validation_times", (2.0,)),
        ("optim.b2", 1.0),
        ("optim.b2", 1 - 1e-9),  # 1 as a float32
        ("optim.networks.critic.lr", 0.0),
        ("optim.lr", 1e-50),
        ("seed", -1),
        ("seed", 2**32),
        ("data.rows", 0),
        ("data.timeout", math.inf),
        ("sample.steps", 0),
        ("fps", math.inf),
        ("fps", 10**400),
        ("steps", 10**400),
        ("guidance_scale", math.nan),
        ("rank", 2.5),
        ("mesh.data", -2),
    ],
)
def test_what_lies_outside_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        check_ranges({name: value})
    told = str(error.value)
    assert f"`{name}`" in told and repr(value) in told and "\n" not in told
    assert "must be a" in told or "must be one of" in told


def test_ends_that_belong_to_a_range_are_taken():
    check_ranges({"optim.b2": 0.0, "cut": 1.0, "data.weights": (0.0, 2.0), "fps": None})
    check_ranges({"seed": 0, "mesh.data": -1, "matmul_precision": "default"})


def test_no_row_is_hidden_by_one_before_it():
    """A row behind a broader one would never hold for anything."""
    for names, row in RANGES.items():
        for name in names.split():
            assert range_of(name.replace("*", "x")) == row, f"{name} is hidden"


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Parses a command line as a door does; returns the flags, or what it says."""

    def parse(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file(
            "config", None, lock_config=True, flag_values=values
        )
        flags.DEFINE_string("negative_prompt", None, "", flag_values=values)
        flags.DEFINE_boolean("draft", None, "", flag_values=values)
        monkeypatch.setattr(flag_parser.flags, "FLAGS", values)
        monkeypatch.setattr("sys.argv", ["door", *arguments])
        flag_parser._parse(["door", *arguments])
        return values

    return parse


def test_names_of_flags_and_configs_are_read_as_users_write_them(parsed):
    found = parsed("--negative-prompt=a-b", "--no-draft", "x")
    assert found.negative_prompt == "a-b" and found.draft is False
    assert parsed("--negative-prompt", "--draft").negative_prompt == "--draft"
    assert parsed("--config=quickstart").config.order
    assert parsed("--config", "quickstart").config.order
    with pytest.raises(SystemExit, match="did you mean 'quickstart'|quickstart"):
        parsed("--config=quikstart")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--config=clips_audio", "--config.optim.bx=1"], "did you mean optim.b"),
        (["--config=clips_audio", "--config.optim=1"], "config.optim"),
        (["--config=clips_audio", "--config.seed.x=1"], "`seed` is a value"),
        (["--config=clips_vae", "--config.steps=9"], "--config.stages.sharp.steps="),
        (["--config=clips_vae", "--config.stags.sharp.steps=9"], "stages.sharp.steps"),
        (["--config=clips_audio", "--config.steps=a"], "steps"),
        (["--negativ_prompt=x"], "negative_prompt"),
    ],
)
def test_a_misspelt_flag_is_told_in_a_line(parsed, arguments, told):
    with pytest.raises(SystemExit) as error:
        parsed(*arguments)
    assert told in error.value.code and "\n" not in error.value.code
