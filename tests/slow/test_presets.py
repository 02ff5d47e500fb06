"""Every file of training_scripts/configs: parsed, its arithmetic and LoRA targets checked, two steps taken with it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from rlhf.algorithms.config import PPOBatchConfig
from rlhf.algorithms.ppo import planned_iterations
from rlhf.config import ModelConfig, load_config_file
from rlhf.engine import BatchPlan
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import apply_lora
from rlhf.pipeline.stages import METHODS, STAGES, parse_stage
from tests.support.tiny_models import save_tiny_model

CONFIGS = Path(__file__).parents[2] / "training_scripts" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SIZES = ("polyglot_ko_1.3b", "polyglot_ko_5.8b", "polyglot_ko_12.8b", "llama2_ko_7b")
RECIPES = ("kullm", "kullm_rlhf", "law_polyglot_lora8bit", "law_polyglot_qlora4bit", "legal_llama2_ko")
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def stages_of(path):
    """The stages of a run that names none, and others that the file has a section for."""
    sections = yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    return [name for name, stage in STAGES.items() if stage.in_default_run or name in sections]


STAGES_OF_FILES = [(path, stage) for path in FILES for stage in stages_of(path)]
every_stage = pytest.mark.parametrize(
    ("path", "stage"), STAGES_OF_FILES, ids=[f"{path.stem}-{stage}" for path, stage in STAGES_OF_FILES]
)


def parse(path, stage, *more):
    """The configuration of one stage as one namespace of fields."""
    parts = parse_stage(stage, ["--config", str(path), *map(str, more)]).parts()
    return {item.name: getattr(part, item.name) for part in parts for item in dataclasses.fields(part)}


def devices(path):
    """The world size a file is meant for, from its first line."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# devices: (\d+)", first)
    assert found, f"{path.name} must begin with `# devices: N`, not {first!r}"
    return int(found[1])


def architecture(base_model):
    """The tiny model that has the modules of `base_model`."""
    return "llama" if "llama" in base_model else "gpt_neox"


def test_every_scale_and_every_recipe_is_there():
    names = {path.stem for path in FILES}
    wanted = {f"{size}_{where}" for size in SIZES for where in ("1gpu", "node", "multinode")} | set(RECIPES)
    assert wanted <= names
    assert {devices(CONFIGS / f"{size}_1gpu.yaml") for size in SIZES} == {1}
    assert all(4 <= devices(CONFIGS / f"{size}_node.yaml") <= 8 for size in SIZES)
    assert all(devices(CONFIGS / f"{size}_multinode.yaml") >= 16 for size in SIZES)


@every_stage
def test_parses_and_its_values_arrive(path, stage):
    parsed = parse(path, stage)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    methods = {method: field for field, names in METHODS.items() for method in names}
    chosen = next((parsed[field] for field in METHODS if field in parsed), None)
    content = load_config_file(path, stage, sections={*STAGES, *methods}, method=chosen).values
    own = STAGES[stage].field_names()
    for name, value in content.items():
        if name in own and isinstance(value, bool | int | str) and not isinstance(parsed[name], float):
            assert parsed[name] == value, f"{path.name}, {stage}: {name}"
        elif name in own and isinstance(parsed[name], float):
            assert parsed[name] == float(value), f"{path.name}, {stage}: {name}"
    for section in written.keys() & {*STAGES, *methods}:
        owner = STAGES.get(section) or next(
            each for each in STAGES.values() if methods[section] in each.field_names() - {section}
        )
        stray = (written[section] or {}).keys() - owner.field_names()
        assert not stray, f"{path.name}: {stray} under {section}: would be passed over in silence"


@every_stage
def test_batches_divide_over_the_intended_devices(path, stage):
    parsed, world = parse(path, stage), devices(path)
    plan = BatchPlan(parsed["global_batch_size"], parsed["micro_batch_size"], world)
    assert plan.most_per_device * world == parsed["global_batch_size"]
    if stage == "ppo":
        rollout = parsed["rollout_batch_size"]
        assert rollout % parsed["global_batch_size"] == 0
        assert rollout % world == 0 and parsed["generation_batch_size"] <= rollout // world


METHODS_OF_FILES = [
    (path, field, method)
    for path in FILES
    for field, names in METHODS.items()
    for method in names
    if method in yaml.safe_load(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(
    ("path", "field", "method"),
    METHODS_OF_FILES,
    ids=[f"{path.stem}-{method}" for path, _, method in METHODS_OF_FILES],
)
def test_a_methods_section_goes_together_with_its_stage(path, field, method):
    stage = "ppo" if field == "advantage" else "offline"
    parsed, world = parse(path, stage, f"--{field}", method), devices(path)
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8"))[method].items():
        assert parsed[name] == type(parsed[name])(value)
    assert BatchPlan(parsed["global_batch_size"], parsed["micro_batch_size"], world).most_per_device >= 1
    if stage == "ppo":
        plain = parse(path, stage)
        assert parsed["rollout_batch_size"] * parsed["samples_per_prompt"] == plain["rollout_batch_size"]


@pytest.mark.parametrize("name", ["default", "polyglot_ko_1.3b_1gpu", "llama2_ko_7b_1gpu"])
def test_every_method_runs_with_the_presets_for_all_of_them(name):
    for field, stage in (("advantage", "ppo"), ("algorithm", "offline")):
        for method in METHODS[field]:
            assert parse(CONFIGS / f"{name}.yaml", stage, f"--{field}", method)[field] == method


@every_stage
def test_starts_on_one_to_eight_devices(path, stage):
    parsed = parse(path, stage)
    for world in range(1, 9):
        plan = BatchPlan(parsed["global_batch_size"], parsed["micro_batch_size"], world, parsed["micro_batch_tokens"])
        total, micro, accumulation = plan.deepspeed_numbers.values()
        assert total == micro * accumulation * world >= parsed["global_batch_size"]
        assert micro <= parsed["micro_batch_size"]
        lengths = torch.randint(3, 300, (plan.global_batch_size,), generator=torch.Generator().manual_seed(1)).tolist()
        parts = plan.micro_batches(lengths)
        assert len(parts) % world == 0 and sum(map(len, parts)) == plan.global_batch_size
        if stage == "ppo":
            batch = PPOBatchConfig(**{field.name: parsed[field.name] for field in dataclasses.fields(PPOBatchConfig)})
            assert planned_iterations(batch, plan, parsed["rollout_batch_size"]) >= 1


@every_stage
def test_settings_go_together(path, stage):
    parsed = parse(path, stage)
    assert not (parsed["quantization"] != "none" and parsed["zero_stage"] == 3), "quantised weights are not partitioned"
    assert not (parsed["quantization"] != "none" and parsed["lora_rank"] == 0), "a quantised base needs an adapter"
    assert not (parsed["offload"] != "none" and parsed["optimizer"] != "adamw")
    assert not (parsed["lora_targets"] and parsed["lora_rank"] == 0), "targets without a rank do nothing"


@every_stage
def test_every_lora_target_is_adapted_in_every_layer(path, stage, tiny_models):
    parsed = parse(path, stage)
    if parsed["lora_rank"] == 0:
        pytest.skip("trains every weight")
    model = load_causal_lm(tiny_models[architecture(parsed["base_model"])], dtype=torch.float32)
    layers = model.config.num_hidden_layers
    fields = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "gradient_checkpointing")
    adapted = apply_lora(model, ModelConfig(**{name: parsed[name] for name in fields}))
    names = [name for name, _ in adapted.named_parameters() if name.endswith("lora_A.default.weight")]
    for target in parsed["lora_targets"]:
        assert sum(f".{target}.lora_A" in name for name in names) == layers * target_count(target, adapted)
    assert {parameter.shape[0] for name, parameter in adapted.named_parameters() if name in names} == {
        parsed["lora_rank"]
    }


def target_count(target, model):
    """How many modules of one layer bear the name: in GPT-NeoX `dense` is the attention's output alone."""
    names = [name for name, _ in model.named_modules() if name.endswith(f".{target}") and ".layers.0." in name]
    assert names, f"{target} is in no layer"
    return len(names)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Instruction rows to train on and others held out."""
    directory = tmp_path_factory.mktemp("data")
    for name, numbers in (("train", range(8)), ("heldout", range(8, 12))):
        rows = [{"instruction": f"{number} plus {number}?", "output": f"It is {2 * number}."} for number in numbers]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def quantizable_models(tmp_path_factory, tokenizer):
    """Tiny models wide enough for bitsandbytes' kernels, which quantise blocks of 64 weights."""
    root = tmp_path_factory.mktemp("wide")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    return {name: save_tiny_model(root / name, name, tokenizer, **wide) for name in ("gpt_neox", "llama")}


@every_file
def test_two_training_steps(path, small_data, quantizable_models, tmp_path):
    """SFT by the stage's own script, with the preset's engine, quantisation, adapter, optimizer and schedule."""
    from step1_sft.main import main

    base = quantizable_models[architecture(parse(path, "sft")["base_model"])]
    small = {
        "base_model": base,
        "sft_data": small_data / "train.jsonl",
        "sft_eval_data": small_data / "heldout.jsonl",
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "precision": "fp32",
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_prompt_tokens": 32,
        "max_response_tokens": 16,
        "max_steps": 2,
        "log_every_steps": 1,
    }
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    result = main(["--config", str(path), *words])
    metrics = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, metrics) if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert result["eval_loss_after"] != result["eval_loss_before"], "two steps left every weight as it was"


def published(name, stage):
    return parse(CONFIGS / f"{name}.yaml", stage)


@pytest.mark.parametrize(
    ("name", "stage", "values"),
    [
        (
            "kullm",
            "sft",
            dict(lora_rank=8, lora_alpha=16, lora_dropout=0.05, global_batch_size=128, micro_batch_size=4)
            | dict(warmup_ratio=0.1, lr_schedule="cosine", base_model="EleutherAI/polyglot-ko-12.8b"),
        ),
        (
            "kullm_rlhf",
            "sft",
            dict(lora_rank=8, lora_alpha=16, lora_dropout=0.05, lora_targets=["query_key_value"], quantization="8bit")
            | dict(learning_rate=3e-4, global_batch_size=16, micro_batch_size=4, epochs=6.0, warmup_steps=100),
        ),
        (
            "kullm_rlhf",
            "reward",
            dict(micro_batch_size=16, global_batch_size=64, weight_decay=0.1, lora_rank=8, zero_stage=0, epochs=1.0)
            | dict(gradient_checkpointing=True, model_dropout=0.0, lora_dropout=0.0, learning_rate=5e-5)
            | dict(base_model="EleutherAI/polyglot-ko-1.3b"),
        ),
        (
            "kullm_rlhf",
            "ppo",
            dict(learning_rate=5e-4, critic_learning_rate=5e-6, lora_rank=128, micro_batch_size=8, ppo_epochs=1)
            | dict(global_batch_size=128, max_prompt_tokens=256, max_response_tokens=256, lr_schedule="cosine")
            | dict(warmup_steps=100, kl_coef=0.1, score_clip=5.0, clip_range=0.2, value_clip_range=0.2)
            | dict(gamma=1.0, lam=0.95),
        ),
        *[
            (
                f"law_polyglot_{variant}",
                "sft",
                dict(learning_rate=2e-5, lr_schedule="linear", warmup_ratio=0.1, epochs=3.0, global_batch_size=32)
                | dict(quantization=quantization, template="law_polyglot"),
            )
            for variant, quantization in (("lora8bit", "8bit"), ("qlora4bit", "4bit"))
        ],
        (
            "legal_llama2_ko",
            "sft",
            dict(quantization="4bit", lora_rank=8, lora_alpha=32, lora_dropout=0.05, gradient_checkpointing=True)
            | dict(lora_targets=["q_proj", "k_proj", "v_proj"], global_batch_size=16, epochs=6.0, learning_rate=1e-4)
            | dict(optimizer="paged_adamw_8bit", base_model="beomi/llama-2-ko-7b", template="kullm"),
        ),
    ],
)
def test_recipes_hold_the_published_hyper_parameters(name, stage, values):
    parsed = published(name, stage)
    assert {field: parsed[field] for field in values} == values


@pytest.mark.parametrize(
    ("name", "stage", "tokens"),
    [
        ("kullm", "sft", 512),
        ("kullm_rlhf", "sft", 2048),
        ("kullm_rlhf", "reward", 512),
        ("legal_llama2_ko", "sft", 1024),
    ],
)
def test_recipes_hold_the_published_lengths(name, stage, tokens):
    parsed = published(name, stage)
    assert parsed["max_prompt_tokens"] + parsed["max_response_tokens"] == tokens
