"""What is wrong with a configuration is said in one message, and the exit code is 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_helpers import environment

from heteroakd_fast.losses import HeteroAKDLoss, HeteroAKDOptions
from heteroakd_fast.train.cli import main
from heteroakd_fast.train.config import Config, DataConfig, DistillConfig, OptimConfig
from heteroakd_fast.train.errors import ConfigError
from heteroakd_fast.train.reading import (
    as_toml,
    load_config,
    parse_command_line,
    parse_config,
)

VALID = """
[data]
kind = "landcover"
[teacher]
arch = "unet"
steps = 3
[student]
arch = "unet"
steps = 3
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("[data]", 'seed = "3"\n[data]'), ["seed", "'3' (str)", "integer"]),
        (("[data]", "sed = 3\n[data]"), ["sed", "unknown key", "did you mean 'seed'?"]),
        (("[data]", "[data]\nroots = 1"), ["data.roots", "unknown key", "'root'"]),
        (
            ('arch = "unet"\nsteps = 3\n[student]', 'arch = "unet"\n[student]'),
            ["teacher.steps", "missing"],
        ),
        (('[data]\nkind = "landcover"\n', ""), ["data", "missing", "[data] with at least kind"]),
        (
            ('"landcover"', '"lancover"'),
            ["data.kind", "'lancover'", "'landcover', 'folder'", "or 'ade20k'"],
        ),
        (('"landcover"', '"folder"'), ["data.root is required"]),
        (("[data]", "[optim]\nlr = -1.0\n[data]"), ["optim.lr", "-1.0", "greater than 0"]),
        (("[data]", "[optim]\nlr = nan\n[data]"), ["optim.lr", "nan", "finite"]),
        (
            ("[data]", "[distill]\nkd_weight = true\n[data]"),
            ["distill.kd_weight", "True (bool)", "number"],
        ),
        (("[data]", "[distill]\ntau = 0.0\n[data]"), ["distill.tau: got 0.0", "a number > 0"]),
        (("[data]", "[distill]\nweight_axis = 'space'\n[data]"), ["only preset='paper' has"]),
        (("[student]", "[student]\ntap = 'x'"), ["teacher.tap is missing"]),
        (("steps = 3\n[student]", "steps = 0\n[student]"), ["teacher", "steps = 0 needs weights"]),
        (("[data]", "[data]\nscale = [2.0, 1.0]"), ["data.scale", "low <= high"]),
        (("[data]", "[data]\ncrop = 8"), ["data.crop: got 8", "at least 16", "[height, width]"]),
        (("[data]", "[data]\ncrop = [32, 8]"), ["data.crop: got [32, 8]"]),
        (("[data]", "[data]\ncrop = [32, 32, 32]"), ["data.crop: got [32, 32, 32]"]),
        (("[data]", "[data]\ncrop = true"), ["data.crop: got True"]),
        (("[data]", "[data]\nresize = [512, 2048]"), ["data.resize", "long >= short >= 16"]),
        (("[data]", "[data]\ncrop_max_ratio = 0.75"), ["data.crop_max_ratio needs data.crop"]),
        (("[data]", "seed = 18446744073709551616\n[data]"), ["seed", "less than"]),
        (
            (
                "[data]",
                "[distill]\nce_weight = 0\nkd_weight = 0\nhetero_weight = 0\ncwd_weight = 3\n"
                "[data]",
            ),
            ["distill: ", "channel-wise distillation goes beside one of them"],
        ),
        (
            (
                'kind = "landcover"',
                'kind = "folder"\nroot = "."\nnum_classes = 2\nclass_names = ["a", "a"]',
            ),
            ["data.class_names has 'a' more than once"],
        ),
        (("[data]", "[data\n"), ["malformed TOML", "line 2"]),
        (("[data]", f"x = {'[' * 5000}\n[data]"), ["malformed TOML"]),
        (("[data]", f"seed = {'9' * 5000}\n[data]"), ["malformed TOML", "digits"]),
        (("[data]", f"seed = 0x{'f' * 5000}\n[data]"), ["cannot be used", "digits"]),
        (("[data]", 'run = "a\\u0000b"\n[data]'), ["run: got 'a\\x00b'", "without NUL"]),
        (("[student]", '[student]\nweights = "\\u0000"'), ["student.weights", "without NUL"]),
        (("[data]", "threads = 1000000\n[data]"), ["threads: got 1000000", "equal to 1024"]),
        (("[data]", "[data]\nworkers = 1000000"), ["data.workers", "equal to 256"]),
        (("[data]", "[data]\ncrop = 1000000"), ["data.crop: got 1000000", "at most 32768"]),
        (("[data]", "[data]\nresize = [1000000, 16]"), ["data.resize.0", "equal to 32768"]),
        (("[data]", "[data]\ncrop = 32\nscale = [1.0, 1e6]"), ["data.scale.1", "equal to 64"]),
        (("[data]", "[data]\nlabelled = true"), ["data.labelled: got True", "a number or a share"]),
        (("[data]", f"[optim]\nbatch_size = {10**15}\n[data]"), ["batch_size", "equal to 10000"]),
        (("[data]", "[scale]\ntimeout = 1e300\n[data]"), ["scale.timeout", "equal to 1000000"]),
        (
            ("[data]", '[distill]\nclass_weight = "balance"\n[data]'),
            ["distill.class_weight: got 'balance'", '"balanced"'],
        ),
        (("[data]", "[distill]\nclass_weight = [1, -1]\n[data]"), ["class_weight: got [1, -1]"]),
    ],
)
def test_message_names_file_key_and_expectation(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    expected: list[str],
) -> None:
    assert change[0] in VALID
    path = tmp_path / "my.toml"
    path.write_text(VALID.replace(*change, 1), encoding="utf-8")
    assert main([str(path)]) == 2
    message = capsys.readouterr().err
    assert "my.toml" in message
    for part in expected:
        assert part in message
    assert "Traceback" not in message


def test_every_option_of_the_loss_can_be_set() -> None:
    """With its default; what is left out is the data's and the ranks'."""
    loss = HeteroAKDLoss(2)
    left_out = {"ignore_index", "allow_ignored_class", "process_group", "teacher_ce_weight"}
    config = DistillConfig()
    for name in HeteroAKDOptions.__annotations__.keys() - left_out:
        assert getattr(config, name) == getattr(loss, name), name
        assert DistillConfig.model_fields[name].description, name
    given = ["--distill.kd-divergence", "js", "--distill.class-weight", "1", "0.5"]
    given += ["--distill.preset", "paper", "--distill.weight-axis", "space"]
    given += ["--distill.resolution", "logits"]
    distill = parse_command_line(given).config.distill
    assert {"kd_divergence": "js", "class_weight": (1.0, 0.5), "preset": "paper"}.items() <= (
        distill.of_loss().items()
    )
    assert (distill.weight_axis, distill.resolution) == ("space", "logits")


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(VALID.replace("steps = 3", "steps = -1"), "my.toml")
    assert str(caught.value).count("\n") == 1


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"my\.toml: cannot be read as text"):
        load_config(path)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(VALID + "[optim]\nlr = 0.5\nbatch_size = 3\n[student.kwargs]\nwidth = 5\n")
    options = parse_command_line([str(path), "--optim.lr", "0.25", "--student.tap", "None"])
    assert options.config.optim.lr == 0.25
    assert options.config.optim.batch_size == 3
    assert options.config.student.kwargs == {"width": 5}
    # The order does not matter.
    assert parse_command_line(["--optim.lr", "0.25", str(path)]).config == options.config


@pytest.mark.parametrize("crop", [(64,), (512, 1024)])
def test_a_crop_has_one_side_or_two(tmp_path: Path, crop: tuple[int, ...]) -> None:
    size = (crop[0], crop[-1])
    given = parse_command_line(["--data.crop", *map(str, crop)]).config
    assert given.data.crop_size == size
    path = tmp_path / "my.toml"
    written = list(crop) if len(crop) == 2 else crop[0]
    path.write_text(VALID.replace("[data]", f"[data]\ncrop = {written}"))
    assert load_config(path).data.crop_size == size


def test_numpys_integers_are_integers() -> None:
    sides = np.array([64, 32])
    options = {"kind": "folder", "root": ".", "num_classes": sides[1], "ignore_index": sides[0]}
    assert DataConfig(**options, crop=sides[0], workers=np.uint8(1)).crop_size == (64, 64)
    config = DataConfig(**options, crop=tuple(sides), resize=tuple(sides))
    numbers = (*config.crop_size, *config.resize, config.num_classes, config.ignore_index)
    assert {type(number) for number in numbers} == {int}
    assert OptimConfig(batch_size=sides[1]).batch_size == 32


@pytest.mark.parametrize(
    "arguments", [["--optim.lr", "-1"], ["--optim.lr", "x"], ["--nothing", "1"]]
)
def test_wrong_override_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    printed = capsys.readouterr()
    assert arguments[0] in printed.err + printed.out or "optim.lr" in printed.err


def test_embedded_default_is_valid_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config()
    assert config.data.kind == "landcover"
    assert main(["--print-config"]) == 0
    # What is printed is a file that means the same, in a folder of its own name.
    printed = capsys.readouterr().out
    assert parse_config(printed, "printed") == config.model_copy(
        update={"run": Path("runs/default")}
    )
    path = tmp_path / "mine.toml"
    path.write_text(printed, encoding="utf-8")
    assert load_config(path) == config.model_copy(update={"run": Path("runs/mine")})
    assert main(["--print-config", "--run", "runs/chosen"]) == 0
    assert 'run = "runs/chosen"' in capsys.readouterr().out.splitlines()[0]


def test_odd_names_are_printed_so_that_they_can_be_read() -> None:
    config = load_config()
    teacher = config.teacher.model_copy(
        update={"kwargs": {"a b": {"ü.": 1}, "x": "\U0001f600\x7f"}}
    )
    config = config.model_copy(update={"teacher": teacher, "run": Path('r"\\\t')})
    assert parse_config(as_toml(config), "printed") == config


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in ("FILE.toml", "--optim.lr", "--distill.kd-weight", "--resume-anyway"):
        assert key in text


NETWORK = {"arch", "steps", "lr", "optimizer", "weight_decay"}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("order", [1, -1], ids=["after the file", "before the file"])
def test_another_architecture_leaves_nothing_of_the_one_before(
    tmp_path: Path, role: str, order: int
) -> None:
    path = tmp_path / "my.toml"
    of_arch = 'tap = "decoder.1"\nweights = "w"\ninit = "i"\nlr = 0.5\n'
    tables = f"[{role}]\narch = 'unet'\n{of_arch}steps = 3\nkwargs = {{ width = 3 }}\n"
    other = "student" if role == "teacher" else "teacher"
    tables += f"[{other}]\narch = 'unet'\nsteps = 3\ntap = 'decoder.2'\n"
    path.write_text(f"[data]\nkind = 'landcover'\n{tables}", encoding="utf-8")

    def network(*options: str) -> dict[str, Any]:
        words = [[str(path)], [f"--{role}.arch", "segformer", *options]][::order]
        config = parse_command_line([*words[0], *words[1]]).config
        found = getattr(config, role).model_dump()
        assert found["arch"] == "segformer"
        assert (found["steps"], found["lr"]) == (3, 0.5)
        return {key: value for key, value in found.items() if key not in NETWORK}

    none = {"kwargs": {}, **dict.fromkeys(("weights", "init", "output", "mean", "std"))}
    assert network(f"--{other}.tap", "None") == {**none, "tap": None}
    given = [f"--{role}.tap", "t", f"--{role}.kwargs", '{"depths": [1, 1]}', f"--{role}.init", "j"]
    new = {**none, "kwargs": {"depths": [1, 1]}, "tap": "t", "init": Path("j")}
    assert network(*given) == new
    with pytest.raises(ConfigError, match=rf"{role}\.tap is missing: set both taps"):
        network()


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ('{"width": 3, "deep": {"a": [1.5, true]}}', {"width": 3, "deep": {"a": [1.5, True]}}),
        ("{ width = 3 }", {"width": 3}),
        ("{}", {}),
    ],
)
def test_kwargs_on_the_command_line(text: str, kwargs: dict[str, Any]) -> None:
    """They go on top of the file's, key by key, as those of a file do."""
    before = load_config().student.kwargs
    config = parse_command_line(["--student.kwargs", text]).config
    assert config.student.kwargs == {**before, **kwargs}
    assert parse_config(as_toml(config), "printed") == config


@pytest.mark.parametrize("text", ["width", "[1]", "{width: 3}", "3", "", "{ a = 1 }\nb = 2"])
def test_kwargs_that_are_no_table(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--student.kwargs", text])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--student.kwargs" in message
    assert "JSON or TOML" in message


@pytest.mark.parametrize("recipe", ["folder", "cityscapes", "voc", "ade20k"])
def test_what_a_recipe_lacks_is_printed_to_be_filled_in(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe, "--print-config", "--optim.lr", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "\n# root = " in printed
    assert "\nlr = 0.25 " in printed
    with pytest.raises(ConfigError, match=r"printed: data\.root is required"):
        parse_config(printed, "printed")
    filled = printed.replace("\n# root = ", '\nroot = "x"')
    if recipe == "folder":
        assert "\n# num_classes = " in filled
        filled = filled.replace("\n# num_classes = ", "\nnum_classes = 5")
    given = ["--data.root", "x", *(["--data.num-classes", "5"] if recipe == "folder" else [])]
    config = parse_command_line([recipe, "--optim.lr", "0.25", *given]).config
    assert parse_config(filled, "filled") == config.model_copy(update={"run": Path("runs/default")})


def test_the_recipe_for_photographs() -> None:
    data = parse_command_line(["folder", "--data.root", "x", "--data.num-classes", "3"]).config.data
    assert (data.kind, data.augment, data.photometric) == ("folder", "flip", True)
    assert data.crop is not None
    assert data.scale[0] < 1.0 < data.scale[1]


@pytest.mark.parametrize("arguments", [["--help"], ["--list-recipes"], ["--print-config"]])
def test_a_pipe_that_nobody_reads(arguments: list[str]) -> None:
    """As in `... | head -1`: no message, and the code of a program that SIGPIPE ends."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from heteroakd_fast.train.cli import main; sys.exit(main(sys.argv[1:]))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=write,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["FIFO", "directory"])
def test_a_configuration_is_a_regular_file(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.toml"
    make(path)
    assert main([str(path)]) == 2
    assert "expected a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a\0b"], "cannot be read as text"),
        (["--data.root", "a\0b"], "data.root: got 'a\\x00b', expected a path without NUL"),
        (["--run", "a\udcffb"], "not UTF-8"),
        (["folder", "--data.root", "\0", "--data.num-classes", "2"], "without NUL"),
    ],
)
def test_names_that_no_file_can_have(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_every_path_of_the_configuration_is_checked() -> None:
    def paths(model: Any) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                found += [f"{name}.{inner}" for inner in paths(field.annotation)]
            elif "Path" in str(field.annotation):
                found.append(name)
        return found

    assert len(paths(Config)) == 8
    for path in paths(Config):
        with pytest.raises(ConfigError, match="expected a path without NUL"):
            parse_command_line([f"--{path.replace('_', '-')}", "\0"])
