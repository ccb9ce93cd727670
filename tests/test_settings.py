"""The presets: what they take from a paper or its code, and the figures that were made with them.

A preset's values are chosen in three ways, and each is held here in its own way: those of a paper
or of released code stand in SOURCED with their source; ours stand in the published results that
were made with them; and a command line must find the preset that its teacher asks for.
"""

import json

import pytest
from scripts import ROOT

import continual
import deepinversion
import generative_ensemble
import pruning
import pseudo_replay
import quantization
import role_kd
import teacher
import zskt
from harness.run import RunOptions

METHODS = {
    "deepinversion": deepinversion,
    "zskt": zskt,
    "pseudo_replay": pseudo_replay,
    "generative_ensemble": generative_ensemble,
    "role_kd": role_kd,
    "continual": continual,
    "quantization": quantization,
    "pruning": pruning,
}

RELEASED = "cifar10-released"
IMAGENET = "imagenet-0 imagenet-1 imagenet-2"
SOURCED = [  # (script, presets, field, value, where the value is from)
    # DeepInversion on CIFAR-10: the released CIFAR script, and section 4.1 for the student
    ("deepinversion", RELEASED, "batch_size", 256, "released script"),
    ("deepinversion", RELEASED, "iterations", 2000, "paper 4.1; released script"),
    ("deepinversion", RELEASED, "iterations_low", 0, "released script: one resolution"),
    ("deepinversion", RELEASED, "lr", 0.05, "paper 4.1; README's parameters of the paper"),
    ("deepinversion", RELEASED, "schedule", "constant", "released script: no schedule"),
    ("deepinversion", RELEASED, "betas", (0.9, 0.999), "released script: Adam's defaults"),
    ("deepinversion", RELEASED, "alpha_bn", 10.0, "README; one of the grid of paper 4.1"),
    ("deepinversion", RELEASED, "first_bn", 1.0, "paper and released script: no such factor"),
    ("deepinversion", RELEASED, "alpha_tv_l2", 2.5e-5, "paper 4.1; released script"),
    ("deepinversion", RELEASED, "alpha_tv_l1", 0.0, "released script"),
    ("deepinversion", RELEASED, "alpha_l2", 0.0, "released script (paper: 3e-8)"),
    ("deepinversion", RELEASED, "jitter", 2, "released script: rolled by up to two pixels"),
    ("deepinversion", RELEASED, "flip", False, "released script"),
    ("deepinversion", RELEASED, "clip", False, "released script"),
    ("deepinversion", RELEASED, "start_blur", 1, "released script: white noise"),
    ("deepinversion", RELEASED, "start_gain", 1.0, "released script: of deviation 1"),
    ("deepinversion", RELEASED, "start_margin", 0, "released script: everywhere"),
    ("deepinversion", RELEASED, "alpha_competition", 10.0, "paper 4.1"),
    ("deepinversion", RELEASED, "temperature", 3.0, "authors in issue 9; released script"),
    ("deepinversion", RELEASED, "epochs", 250, "paper's supplement"),
    ("deepinversion", RELEASED, "steps_per_epoch", 195, "paper's supplement"),
    ("deepinversion", RELEASED, "student_batch", 256, "paper's supplement"),
    ("deepinversion", RELEASED, "batches_per_epoch", 2, "paper's supplement, ResNet-34 teacher"),
    ("deepinversion", RELEASED, "lr_student", 0.1, "paper's supplement"),
    ("deepinversion", RELEASED, "schedule_student", "steps", "paper's supplement"),
    ("deepinversion", RELEASED, "drop_every", 100, "paper's supplement"),
    ("deepinversion", RELEASED, "optimizer", "sgd", "DAFL's recipe; the paper names none"),
    ("deepinversion", RELEASED, "initial_batches", 50, "a reproduction (Fed_distill)"),
    # DeepInversion on ImageNet: the released class and its three settings
    ("deepinversion", "imagenet-0", "iterations_low", 2000, "released setting 0: 112 pixels"),
    ("deepinversion", "imagenet-0", "iterations", 1000, "released setting 0: 224 pixels"),
    ("deepinversion", "imagenet-1", "iterations_low", 0, "released setting 1"),
    ("deepinversion", "imagenet-1", "iterations", 2000, "released setting 1"),
    ("deepinversion", "imagenet-2", "iterations_low", 0, "released setting 2"),
    ("deepinversion", "imagenet-2", "iterations", 20000, "released setting 2; paper 4.2"),
    ("deepinversion", "imagenet-0 imagenet-1", "betas", (0.5, 0.9), "released settings 0 and 1"),
    ("deepinversion", "imagenet-2", "betas", (0.9, 0.999), "released setting 2; supplement"),
    ("deepinversion", "imagenet-0 imagenet-1", "clip", True, "released settings 0 and 1"),
    ("deepinversion", "imagenet-2", "clip", False, "released setting 2"),
    ("deepinversion", IMAGENET, "optimizer", "sgd-imagenet", "NVIDIA's recipe; paper 4.4"),
    ("deepinversion", IMAGENET, "batch_size", 64, "released default"),
    ("deepinversion", IMAGENET, "lr", 0.2, "released default"),
    ("deepinversion", IMAGENET, "schedule", "cosine", "released code"),
    ("deepinversion", IMAGENET, "warmup", 100, "released code"),
    ("deepinversion", IMAGENET, "alpha_bn", 0.05, "released default"),
    ("deepinversion", IMAGENET, "first_bn", 10.0, "released default"),
    ("deepinversion", IMAGENET, "alpha_tv_l2", 1e-4, "released default; paper 4.2"),
    ("deepinversion", IMAGENET, "alpha_tv_l1", 0.0, "released default"),
    ("deepinversion", IMAGENET, "alpha_l2", 1e-5, "released default"),
    ("deepinversion", IMAGENET, "jitter", 30, "released code; supplement"),
    ("deepinversion", IMAGENET, "flip", True, "README's commands; supplement"),
    ("deepinversion", IMAGENET, "start_blur", 1, "released code: white noise"),
    ("deepinversion", IMAGENET, "alpha_competition", 0.2, "README; paper"),
    ("deepinversion", IMAGENET, "temperature", 3.0, "paper 4.4; released code"),
    ("deepinversion", IMAGENET, "student_batch", 1024, "paper 4.4"),
    ("deepinversion", IMAGENET, "lr_student", 1.024, "paper 4.4"),
    ("deepinversion", IMAGENET, "epochs", 90, "paper 4.4"),
    ("deepinversion", IMAGENET, "batches_per_epoch", 0, "paper 4.4: all images first"),
    ("deepinversion", IMAGENET, "initial_batches", 2188, "paper 4.4: 140,000 images, by 64"),
    ("deepinversion", IMAGENET, "steps_per_epoch", 137, "paper 4.4: 140,000 images, by 1024"),
    ("deepinversion", IMAGENET, "warmup_student", 1096, "NVIDIA's ResNet-50 recipe: 8 epochs"),
    ("deepinversion", IMAGENET, "schedule_student", "cosine", "NVIDIA's ResNet-50 recipe"),
    # Zero-shot knowledge transfer on CIFAR-10: released code and logs
    ("zskt", "cifar10", "pseudo_batches", 80000, "paper; logs"),
    ("zskt", "cifar10", "batch_size", 128, "released code"),
    ("zskt", "cifar10", "n_generator_iter", 1, "paper; logs"),
    ("zskt", "cifar10", "n_student_iter", 10, "paper; logs (the code's default is 7)"),
    ("zskt", "cifar10", "lr_generator", 1e-3, "released code and logs (paper: 2e-3)"),
    ("zskt", "cifar10", "lr_student", 2e-3, "paper; logs"),
    ("zskt", "cifar10", "beta", 250.0, "paper; logs"),
    ("zskt", "cifar10", "temperature", 1.0, "paper; released code"),
    ("zskt", "cifar10", "divergence", "kl", "paper, eq. 1"),
    ("zskt", "cifar10", "fresh_z", False, "released code"),
    ("zskt", "cifar10", "width", 128, "released code"),
    ("zskt", "cifar10", "affine", True, "released code since paper v3"),
    ("zskt", "cifar10", "clip_grad", 5.0, "released code"),
    ("zskt", "cifar10", "evaluations", 100, "released code: every N / 100 pseudo-batches"),
    ("zskt", "cifar10", "student", "wrn_16_1", "paper, table 1"),
    # Pseudo replay: the released configuration, CIFAR-100; the bank is of a re-implementation
    ("pseudo_replay", "cifar10", "memory", "vae", "paper"),
    ("pseudo_replay", "cifar10", "student", "resnet18_cifar", "paper; released code"),
    ("pseudo_replay", "cifar10", "epochs", 400, "released code"),
    ("pseudo_replay", "cifar10", "iterations", 36, "released code"),
    ("pseudo_replay", "cifar10", "n_student_iter", 10, "released code"),
    ("pseudo_replay", "cifar10", "n_memory_iter", 4, "released code"),
    ("pseudo_replay", "cifar10", "batch_size", 1024, "released code"),
    ("pseudo_replay", "cifar10", "n_memory", 128, "released code: an eighth of the batch"),
    ("pseudo_replay", "cifar10", "latent", 1000, "released code"),
    ("pseudo_replay", "cifar10", "width", 128, "released code"),
    ("pseudo_replay", "cifar10", "lr_generator", 0.02, "released code"),
    ("pseudo_replay", "cifar10", "lr_memory", 0.02 / 40, "released code"),
    ("pseudo_replay", "cifar10", "lr_student", 0.1, "released code"),
    ("pseudo_replay", "cifar10", "optimizer", "sgd", "released code"),
    ("pseudo_replay", "cifar10", "alpha_onehot", 1.0, "released code"),
    ("pseudo_replay", "cifar10", "alpha_entropy", 5.0, "released code"),
    ("pseudo_replay", "cifar10", "alpha_act", 0.1, "released code"),
    ("pseudo_replay", "cifar10", "alpha_kl", 1e-5, "released code"),
    ("pseudo_replay", "cifar10", "divergence", "released", "released code"),
    ("pseudo_replay", "cifar10", "reconstruction", "pixel+logit", "released code"),
    ("pseudo_replay", "cifar10", "latent_tuning", "leaky", "released code"),
    ("pseudo_replay", "cifar10", "bank_capacity", 10, "re-implementation of MB-DFKD"),
    ("pseudo_replay", "cifar10", "bank_every", 5, "re-implementation of MB-DFKD"),
    # Generative ensemble: the generator alone is released
    ("generative_ensemble", "cifar10", "width", 128, "released code"),
    ("generative_ensemble", "cifar10", "stages", 0, "released code: 2 up-samplings at 32 pixels"),
    ("generative_ensemble", "cifar10", "student", "resnet18_cifar", "later papers' tables"),
]


@pytest.mark.parametrize(
    ("script", "presets", "field", "value", "source"),
    SOURCED,
    ids=lambda part: str(part) if isinstance(part, str) and " " not in part else "",
)
def test_a_value_of_a_paper_or_of_released_code_is_kept(script, presets, field, value, source):
    for name in presets.split():
        assert getattr(METHODS[script].PRESETS[name], field) == value, (name, source)


def test_derived_values_follow_from_the_papers_numbers():
    """140,000 images of ImageNet, and the length of their epochs."""
    args = deepinversion.PRESETS["imagenet-0"]
    assert (args.initial_batches - 1) * args.batch_size < 140_000
    assert args.initial_batches * args.batch_size >= 140_000
    assert (args.steps_per_epoch - 1) * args.student_batch < 140_000
    assert args.steps_per_epoch * args.student_batch >= 140_000
    assert args.warmup_student == 8 * args.steps_per_epoch


def test_constants_of_released_code_are_kept():
    assert zskt.Z_DIM == 100  # released code
    assert pseudo_replay.LATENT_LR == 0.02  # released code: one Adam step on the latents
    recipe = teacher.Args()  # DAFL's
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 5e-4)


# Which preset a run takes


@pytest.mark.parametrize("script", METHODS)
def test_every_preset_is_named_by_its_own_setting(script):
    for name, args in METHODS[script].PRESETS.items():
        assert args.setting == name
        assert args.out == f"runs/{script}/default"
        assert not args.smoke and not args.resume and args.fused


@pytest.mark.parametrize("script", METHODS)
def test_every_preset_survives_the_command_line(monkeypatch, script):
    """A value that no option can express would change, or be refused."""
    module = METHODS[script]
    for name, preset in module.PRESETS.items():
        monkeypatch.setattr("sys.argv", [f"{script}.py", "--setting", name, "--seed", "3"])
        args = module.parse_args(module.PRESETS)
        assert args.seed == 3
        args.seed = preset.seed
        assert args == preset


def test_a_run_of_continual_without_a_setting_takes_digits(monkeypatch):
    monkeypatch.setattr("sys.argv", ["continual.py"])
    args = continual.parse_args(continual.PRESETS)
    assert args == continual.PRESETS["digits"]


TAKEN = [  # (--teacher, --dataset, preset of the same name as the data set)
    ("mnist-resnet8", "", "mnist"),
    ("digits-resnet8", "auto", "digits"),
    ("cifar10-resnet20", "", "cifar10"),
    ("cifar10-wrn-16-1", "none", "cifar10"),
    ("", "mnist", "mnist"),
    ("", "digits", "digits"),
    ("digits-resnet8", "mnist", "mnist"),
    ("my_nets.py:factory", "digits", "digits"),
    ("cifar10-resnet20", "cifar100", "cifar10"),
]


@pytest.mark.parametrize("script", [n for n in METHODS if n not in ("role_kd", "continual")])
def test_a_run_takes_the_preset_of_its_images_or_its_teacher(script):
    module = METHODS[script]
    for spec, dataset, preset in TAKEN:
        assert module.choose_preset(spec, dataset) == preset, (spec, dataset)
    unknown = "any" if script == "deepinversion" else "cifar10"
    assert module.choose_preset("resnet18_cifar", "") == unknown
    assert module.choose_preset("my_nets.py:factory", "none") == unknown
    default = "cifar10" if script == "deepinversion" else "digits"
    assert module.choose_preset("", "") == default
    imagenet = "imagenet" if script == "deepinversion" else "cifar10"
    assert module.choose_preset("resnet50", "") == imagenet


# Figures that were published

RENAMED = {  # by the commits that made the figures
    "blur": "start_blur",
    "gain": "start_gain",
    "margin": "start_margin",
    "initial": "initial_batches",
    "student_warmup": "warmup_student",
}
DROPPED = {  # options that are no more, and the value that the scripts always have now
    "moments": "l2",
    "ema": 0.0,
    "priors_per_image": False,
    "sync_moments": False,
    "world": 1,
    "given": 0,
    "alpha_tv": 0.0,
    "alpha_l2": 0.0,
    "fused_bn": True,
    "fused_distance": True,
    "fused_view": True,
    "drop": 10**6,  # no drop: a cosine
}
NOT_OF_THE_METHOD = {"name", "fused", "graph", "bf16", "competition"}
SHORTER_STUDENT = {  # options of the commands of 4,500 updates in results/README.md
    "iterations",
    "second_class",
    "initial_batches",
    "epochs",
    "steps_per_epoch",
    "student_batch",
}
CIFAR10_STUDENT = {  # options of its command in results/README.md; no batch competed
    "iterations",
    "initial_batches",
    "epochs",
    "steps_per_epoch",
    "batches_per_epoch",
    "student_batch",
    "alpha_competition",
}


def describe_student(arm, setting):
    """A run's options and those of them that its command changed."""
    if "setting" in setting:
        setting = {**setting, "name": "cifar10-student"}  # which got this name after the run
        for name in RunOptions.__dataclass_fields__:
            setting.pop(name, None)
        changed = {"student", "verifier", "images", "batches_per_epoch", "setting"}
        if arm.endswith("4,500 updates of 128"):
            changed |= SHORTER_STUDENT
        return setting, changed
    if setting["name"] == "cifar10":
        return setting, CIFAR10_STUDENT
    if arm == "cross-entropy alone":
        return setting, {"alpha_bn", "alpha_tv_l2"}
    return setting, set()


def list_published():
    """(file, script, setting, options that its command changed) of every published run."""
    for path in sorted((ROOT / "results").glob("*.json")):
        result = json.loads(path.read_text())
        kind = path.stem.partition("-")[0]
        if kind == "inversion":
            yield path.name, "deepinversion", result["setting"], set()
        elif kind == "zskt":
            setting = result["setting"]
            setting["clip_grad"] = setting.pop("clip")  # the option's former name
            yield path.name, "zskt", setting, set()
        elif path.stem.startswith("role-kd-digits"):
            setting = {**result["setting"], "name": result["setting"]["setting"]}
            for name in RunOptions.__dataclass_fields__:
                del setting[name]
            yield path.name, "role_kd", setting, {"student", "arm", "bits"}
        elif kind == "quantization":
            setting = {**result["setting"], "name": result["setting"]["setting"]}
            for name in RunOptions.__dataclass_fields__:
                del setting[name]
            changed = {"images", "num_images", "test_images", "bits", "low_pass"}
            yield path.name, "quantization", setting, changed
        elif kind == "pruning":
            setting = {**result["setting"], "name": result["setting"]["setting"]}
            for name in RunOptions.__dataclass_fields__:
                del setting[name]
            changed = {"images", "num_images", "test_images"}
            yield path.name, "pruning", setting, changed | {"criterion", "statistics", "latency"}
        elif kind == "continual":
            setting = {**result["setting"], "name": result["setting"]["setting"]}
            for name in RunOptions.__dataclass_fields__:
                del setting[name]
            yield path.name, "continual", setting, {"images", "test_images", "arms"}
        elif kind == "ensemble" and "setting" in result:
            yield path.name, "generative_ensemble", result["setting"], set()
        elif kind == "replay":
            fields = {key: value for key, value in result.items() if key != "arms"}
            for key in ("teacher", "dataset", "teacher_accuracy"):
                fields.pop(key)
            yield path.name, "pseudo_replay", fields, set()
        elif kind == "students":
            for arm, runs in result["arms"].items():
                for run in runs:
                    yield path.name, "deepinversion", *describe_student(arm, run["setting"])


def translate(setting):
    """A published setting in today's options."""
    today = {}
    for name, value in setting.items():
        if name == "stages" and isinstance(value, list):
            ((iterations, _, jitter),) = value  # all published images have one resolution
            today |= {"iterations": iterations, "jitter": jitter, "iterations_low": 0}
        else:
            today[RENAMED.get(name, name)] = value
    return today


PUBLISHED = list(list_published())


@pytest.mark.parametrize(
    ("file", "script", "setting", "changed"), PUBLISHED, ids=[entry[0] for entry in PUBLISHED]
)
def test_a_published_figure_is_of_a_preset_as_it_stands(file, script, setting, changed):
    preset = METHODS[script].PRESETS[setting["name"]]
    compared = 0
    for name, value in translate(setting).items():
        if name in NOT_OF_THE_METHOD or name in changed:
            continue
        if name == "drop" and value is None:
            continue  # constant by epochs, before it became a cosine by steps
        if script == "generative_ensemble" and name == "stages":
            value = 0 if value == 2 else value  # what 0 comes to at 32 pixels
        if name in DROPPED and not hasattr(preset, name):
            assert value == DROPPED[name], name
            continue
        expected = getattr(preset, name)
        if isinstance(expected, tuple):
            value = tuple(value)
        assert value == expected, name
        compared += 1
    assert compared >= 10


def test_every_published_file_is_compared():
    compared = {file for file, *_ in PUBLISHED}
    tables = {"ensemble-arms-digits.json", "ensemble-arms-mnist.json", "ensemble-speed.json"}
    # of runs that stand in other files, or of no training
    tables |= {"mte-mnist.json", "architectures.json", "real-moments.json"}
    tables |= {"role-kd-cifar10.json"}  # of a small budget, which its command states
    # whose options results/which.py holds
    tables |= {"which-digits.json", "which-mnist.json", "which-cifar10.json"}
    # runs of results/imagenet.py and results/moment_forms.py, which name the options they change
    tables |= {"imagenet.json", "moment-forms.json"}
    tables |= {"bf16-cpu.json"}  # runs of the default, with --bf16-cpu and without
    assert compared | tables == {path.name for path in (ROOT / "results").glob("*.json")}
