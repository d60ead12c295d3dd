"""The command line of training: every flag is read, nothing unknown passes."""

from pathlib import Path

import pytest

from gm.runtime import RuntimeArgs
from gm.training.args import VERSIONS, find_weights, parse_train_args
from tests.tiny import CONFIGS

CONCEPT = ["--data_path", "datasets/cat_toy", "--placeholder_token", "<cat-toy>"]
MICRO = ["--config", str(CONFIGS["micro"]), *CONCEPT]

# README's two commands, less the names of config and weights.
OBJECT = """--data_path datasets/cat_toy --save_path runs/cat_toy --infer_during_train True
    --gradient_accumulation_steps 4 --num_vectors 10 --total_step 3000 --placeholder_token <cat-toy>
    --learnable_property object""".split()
STYLE = """--data_path datasets/chinese_art --save_path runs/chinese_art --infer_during_train True
    --gradient_accumulation_steps 4 --num_vectors 10 --total_step 3000 --placeholder_token <chinese-art>
    --learnable_property style""".split()


@pytest.mark.parametrize("command, what", [(OBJECT, "object"), (STYLE, "style")])
def test_the_original_commands_mean_what_they_say(command, what):
    args = parse_train_args(command)
    assert (args.total_step, args.accumulation_steps, args.total_updates) == (3000, 4, 750)
    assert (args.num_vectors, args.batch_size, args.infer_during_train) == (10, 1, True)
    assert args.learnable_property == what and all(args.placeholder_token in p for p in args.validation_prompts)
    assert args.version.name == "SD-XL-base-1.0" and args.data.size == (1024, 1024)
    assert args.config_path.name == "sd_xl_base_finetune_textual_inversion.yaml" and args.config_path.is_file()
    assert args.optim.clip_grad and args.optim.milestones == [500, 625]


@pytest.mark.parametrize(
    "flags, read",
    [
        ("--weight w.ckpt", lambda a: a.weight == Path("w.ckpt")),
        ("--save_path out", lambda a: a.save_path == Path("out")),
        ("", lambda a: a.save_path == Path("runs")),
        ("--num_vectors 3", lambda a: a.num_vectors == 3),
        ("--initializer_token toy", lambda a: a.initializer_token == "toy"),
        ("--initializer_embedding a.pt", lambda a: a.initializer_embedding == Path("a.pt")),
        ("--learnable_property face", lambda a: a.learnable_property == "face"),
        ("--template_file t.txt", lambda a: a.template_file == Path("t.txt")),
        ("--total_step 7", lambda a: a.total_step == 7),
        ("--train_batch_size 2", lambda a: a.batch_size == 2),
        ("--gradient_accumulation_steps 2", lambda a: a.accumulation_steps == 2 and a.total_updates == 2),
        ("--learning_rate 3e-4", lambda a: a.optim.lr == 3e-4 and a.config.optim.lr == 3e-4),
        ("--clip_grad False", lambda a: a.optim.clip_grad is False),
        ("--clip_grad True --max_grad_norm 0.5", lambda a: a.optim.clip_grad and a.optim.max_grad_norm == 0.5),
        ("--log_interval 3", lambda a: a.log_interval == 3),
        ("--save_ckpt_interval 4", lambda a: a.save_interval == 4),
        ("--max_num_ckpt 5", lambda a: a.max_num_ckpt == 5),
        ("", lambda a: a.max_num_ckpt is None and not a.infer_during_train and not a.dry_run),
        ("--infer_during_train 1 --infer_interval 6", lambda a: a.infer_during_train and a.infer_interval == 6),
        ("--validation_prompt one two", lambda a: a.validation_prompts == ("one", "two")),
        ("--guidance_scale 2.5", lambda a: a.guidance_scale == 2.5),
        ("--resume runs/a", lambda a: a.resume == Path("runs/a") and a.save_path == Path("runs/a")),
        ("--resume runs/a/state/step_00000004.npz", lambda a: a.save_path == Path("runs/a")),
        ("--resume runs/a --save_path b", lambda a: a.save_path == Path("b")),
        ("--dry_run", lambda a: a.dry_run),
        ("--dry_run False", lambda a: not a.dry_run),
        ("--version SDXL-small", lambda a: a.version.name == "SD-XL-small"),
        ("--seed 0", lambda a: a.runtime.seed == 0),
        ("--device_target CPU", lambda a: a.runtime.device_target == "CPU"),
        ("--ms_mode 1", lambda a: a.runtime.ms_mode == "pynative"),
        ("--ms_mode 0", lambda a: a.runtime.ms_mode == "graph"),
        ("--jit_level O1", lambda a: a.runtime.jit_level == "O1"),
        ("--ms_amp_level O2", lambda a: a.runtime.ms_amp_level == "O2"),
        ("--flash_attention True", lambda a: a.runtime.flash_attention),
        ("--is_parallel True", lambda a: a.runtime.is_parallel),
        ("--is_parallel false", lambda a: a.runtime == RuntimeArgs()),
    ],
)
def test_every_flag_is_read(flags, read):
    assert read(parse_train_args([*MICRO, *flags.split()]))


def test_values_of_the_config_can_be_overridden_from_anywhere_on_the_command_line():
    args = parse_train_args(["optim.lr=0.25", *MICRO, "data.flip=True", "--seed", "3", "optim.milestones=[1,2]"])
    assert (args.optim.lr, args.data.flip, args.optim.milestones) == (0.25, True, [1, 2])
    behind_prompts = parse_train_args([*MICRO, "--validation_prompt", "a <cat-toy>", "data.target_size=[64,128]"])
    assert behind_prompts.validation_prompts == ("a <cat-toy>",) and behind_prompts.data.size == (64, 128)


def test_a_flag_wins_over_the_config_and_an_override_over_both():
    assert parse_train_args([*MICRO, "--total_step", "9"]).total_step == 9
    assert parse_train_args([*MICRO, "--total_step", "9", "data.total_step=8"]).total_step == 8


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--num_vector 3", "--num_vector"),  # not even the beginning of a known flag
        ("--epochs 3", "--epochs"),
        ("--infer_during_train maybe", "neither True nor False"),
        ("--total_step 0", "'0' is not a whole number of at least 1"),
        ("--total_step 1e3", "'1e3' is not a whole number"),
        ("--ms_mode 2", "'2' is no mode"),
        ("--learnable_property thing", "'thing'"),
        ("--jit_level O9", "'O9'"),
        ("--version SD-1.5", "'SD-1.5'"),
    ],
)
def test_an_unknown_flag_or_value_stops_the_run(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_args([*MICRO, *flags.split()])
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, words",
    [("optim.learning_rate=1", "optim.learning_rate: unknown key"), ("optim.lr=fast", "optim.lr"),
     ("nonsense", "'nonsense' is not of the form"), ("data.target_size=[1,2,3]", "data.target_size"),
     ("data.target_size=big", "data.target_size"), ("data.total_step=0", "data.total_step"),
     ("data.per_batch_size=0", "data.per_batch_size")],
)  # fmt: skip
def test_an_override_that_does_not_fit_names_its_key(override, words):
    with pytest.raises(ValueError, match=words):
        parse_train_args([*MICRO, override])


def test_weights_are_looked_for_where_the_readme_says_and_missing_ones_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    version = VERSIONS["SDXL-base-1.0"]
    with pytest.raises(FileNotFoundError, match=r"sd_xl_base_1.0_ms.ckpt and .*--weight"):
        find_weights(None, version)
    with pytest.raises(FileNotFoundError, match="--weight 'w.ckpt' does not exist"):
        find_weights(Path("w.ckpt"), version)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / version.weights[1]).touch()
    assert find_weights(None, version) == Path(version.weights[1])
