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
        ("not_a_field", 1),
    ],
)
def test_fault_names_the_field(field, value):
    assert field in fault(**{field: value})


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
