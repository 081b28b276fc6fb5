"""A recipe is valid, frozen, and says which field is wrong otherwise."""

import pytest
from pydantic import ValidationError

from pocketune.errors import RecipeError
from pocketune.recipe import Recipe

PROMPT = "a photo of sks toy"


def fault(**values: object) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.create(**({"instance_prompt": PROMPT} | values))
    assert "docs/recipe.md lists all fields" in str(caught.value)
    return str(caught.value)


def test_a_prompt_is_enough():
    recipe = Recipe.create(instance_prompt=PROMPT)
    assert recipe.skip == "none"
    assert recipe.class_prompt is None
    assert recipe == Recipe(instance_prompt=PROMPT)
    with pytest.raises(RecipeError, match="instance_prompt"):
        Recipe.create()


def test_is_frozen_and_hashable():
    recipe = Recipe.create(instance_prompt=PROMPT)
    with pytest.raises(ValidationError):
        recipe.steps = 3
    assert hash(recipe) == hash(recipe.model_copy())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instance_prompt", ""),
        ("class_prompt", ""),
        ("steps", 0),
        ("steps", 1.5),
        ("steps", "many"),
        ("batch_size", 0),
        ("rank", 0),
        ("rank", -4),
        ("resolution", 8),
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("prior_loss_weight", -0.1),
        ("seed", -1),
        ("seed", 2**63),
        ("weighting_scheme", "uniform"),
        ("dtype", "int8"),
        ("cache_limit_mb", 0),
        ("draws", 0),
        ("gradient", "none"),
        ("zo_queries", 2),
        ("method", "scales"),
        ("weight_bits", 3),
        ("quantizer", "hqq"),
        ("scale_intervals", 4),
        ("mix_width", 0.2),
        ("low_resolution", 64),
        ("sample_steps", 0),
        ("lora_targets", "to_q"),
        ("lora_targets", []),
        ("lora_targets", [""]),
        ("not_a_field", 1),
    ],
)
def test_fault_names_the_field(field, value):
    assert field in fault(**{field: value})


def test_a_mixture_whose_zeroth_order_steps_become_rarer_is_refused():
    assert "mix_end 0.4 is above mix_start 0.3" in fault(gradient="mixed", mix_start=0.3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gradient": "zeroth_order", "learning_rate": 4e-3}, "Zeroth-order steps have zo_learning_rate"),
        ({"gradient": "zeroth_order", "max_grad_norm": 2}, "Set gradient to backprop or mixed, or leave max_grad_norm out"),
        ({"method": "scales", "weight_bits": 8, "learning_rate": 4e-3}, "scales have scale_learning_rate"),
        ({"method": "scales", "weight_bits": 8, "weight_decay": 0.1}, "weight_decay"),
        ({"method": "scales", "weight_bits": 8, "rank": 8}, "rank"),
        ({"method": "token", "lora_targets": ["to_q"]}, "lora_targets"),
        ({"method": "scales", "weight_bits": 8, "scale_inputs": False, "scale_in_learning_rate": 1}, "scale_in_learning_rate"),
        ({"method": "scales", "weight_bits": 8, "gradient": "zeroth_order", "scale_learning_rate": 1}, "scale_learning_rate"),
        ({"method": "token", "gradient": "mixed", "subspace_steps": 4}, "subspace_steps"),
        ({"gradient": "zeroth_order", "zo_optimizer": "adam", "weight_decay": 0.1}, "weight_decay"),
        ({"class_images": 4}, "Set class_prompt, or leave class_images out"),
        ({"prior_loss_weight": 0.5}, "class_prompt"),
        ({"weighting_scheme": "none", "logit_mean": 0.5}, "logit_mean"),
        ({"mode_scale": 1.0}, "weighting_scheme to mode"),
        ({"cache_limit_mb": 100}, "Set skip, or leave cache_limit_mb out"),
        ({"skip": "0-1", "use_residuals": False, "cache_limit_mb": 100}, "use_residuals to True"),
        ({"skip": "auto:0", "cache_limit_mb": 100}, "while skip is auto:0. Set skip"),
        ({"skip": "hollow:.00", "cache_dtype": "int8"}, "while skip is hollow:.00"),
        ({"skip": "last:0.0", "use_residuals": False}, "while skip is last:0.0"),
        ({"gradient": "mixed", "mix_largest": 0.0, "zo_queries": 2}, "Set mix_largest, or leave zo_queries out"),
        ({"gradient": "mixed", "mix_largest": 0.0, "mix_start": 0.5}, "mix_largest"),
        ({"gradient": "mixed", "mix_largest": 0.0, "mix_end": 0.5}, "mix_largest"),
        ({"gradient": "mixed", "mix_largest": 0.0, "mix_width": 0.5}, "mix_largest"),
        ({"method": "token", "gradient": "zeroth_order", "subspace_noise": 0.1}, "Set subspace_steps"),
        ({"skip": "0-1", "steps": 20, "refresh_every": 20}, "Set more steps, or leave refresh_every out"),
    ],
)
def test_fields_without_effect_are_refused(values, words):
    message = fault(**values)
    assert "has no effect while" in message and words in message
    kept = Recipe.relevant({"instance_prompt": PROMPT} | values)
    assert len(kept) == len(values)  # all but the last
    assert Recipe.create(**kept)


def test_a_setting_without_effect_decides_nothing():
    """As in records of versions that let more pass."""
    values = {"instance_prompt": PROMPT, "gradient": "zeroth_order", "mix_largest": 0.0, "zo_queries": 2}
    assert Recipe.relevant(values).keys() == values.keys() - {"mix_largest"}


def test_what_turns_an_effect_on_lets_the_field_pass():
    for values in (
        {"skip": "0-1", "cache_limit_mb": 100},
        {"gradient": "mixed", "mix_largest": 0.5, "zo_queries": 2, "mix_start": 0.5},
        {"method": "token", "gradient": "zeroth_order", "subspace_steps": 4, "subspace_noise": 0.1},
        {"skip": "0-1", "steps": 20, "refresh_every": 19},
    ):
        assert Recipe.create(instance_prompt=PROMPT, **values)


def test_a_share_of_nothing_skips_no_block():
    reason = fault(skip="hollow:0", refresh_every=10)
    assert "there is none" in reason and reason == fault(skip="none", refresh_every=10)
    assert Recipe.create(instance_prompt=PROMPT, skip="hollow:0", method="token")
    assert "one prompt" in fault(skip="hollow:0.01", method="token")


def test_a_change_is_validated_and_keeps_what_was_given():
    recipe = Recipe.create(instance_prompt=PROMPT, rank=4)
    assert recipe.changed(steps=9).model_fields_set == {"instance_prompt", "rank", "steps"}
    with pytest.raises(RecipeError, match="steps"):
        recipe.changed(steps=0)


def test_all_faults_are_named_at_once():
    message = fault(steps=0, rank=0)
    assert "steps" in message
    assert "rank" in message


def test_toml_round_trip(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'instance_prompt = "{PROMPT}"\nsteps = 7\nskip = "0-3,8-11"\nlora_targets = ["attn.to_q"]\nlearning_rate = 1e-3\n'
    )
    recipe = Recipe.from_toml(path)
    assert (recipe.steps, recipe.skip, recipe.lora_targets, recipe.learning_rate) == (7, "0-3,8-11", ("attn.to_q",), 1e-3)
    assert Recipe.create(**recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_overrides_win_unless_they_are_none(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(f'instance_prompt = "{PROMPT}"\nsteps = 7\nrank = 2\n')
    recipe = Recipe.from_toml(path, steps=9, rank=None, seed=0)
    assert (recipe.steps, recipe.rank, recipe.seed) == (9, 2, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"steps = ", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"steps = 7\n", "instance_prompt"),
        (b'instance_prompt = "x"\nsteps = "seven"\n', "steps"),
        (b'instance_prompt = "x"\n[recipe]\nsteps = 7\n', "recipe"),
    ],
)
def test_bad_toml(tmp_path, content, words):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        Recipe.from_toml(path)


def test_missing_recipe(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            Recipe.from_toml(path)
