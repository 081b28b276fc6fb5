"""What is decided before anything is loaded: resolution, patches, and the blocks that are skipped."""

from __future__ import annotations

from pocketune.errors import PlanError
from pocketune.methods.lora import check_targets
from pocketune.methods.scales import trained_layers
from pocketune.phases.state import Job
from pocketune.plan.blocks import BlockPlan
from pocketune.plan.skipping import plan_of
from pocketune.sample import check_side
from pocketune.weights.quantizers import packs


def check_resolution(job: Job) -> None:
    """Refuse a resolution that the model cannot work at, and patches or positions that do not fit it."""
    check_side(job.folder, job.resolution)
    unit = job.folder.resolution_unit
    _ = job.patches, job.canvas
    if job.recipe.gradient == "mixed" and (job.low_resolution % unit or job.low_resolution >= job.patches.smallest):
        msg = (
            f"low_resolution {job.low_resolution} does not fit: expected a multiple of {unit} below that of the "
            f"training images, {job.patches.smallest}. Leave low_resolution out to take half."
        )
        raise PlanError(msg)


def plan_blocks(job: Job) -> BlockPlan:
    """Which blocks are skipped; refuses what makes no sense for the architecture, targets among it."""
    adapter = job.folder.empty_denoiser()
    plan = plan_of(adapter, job.recipe, folder=job.folder)
    if job.recipe.method == "lora":
        check_targets(adapter, blocks=plan.kept, targets=job.recipe.lora_targets)
    if job.recipe.method == "scales" and job.recipe.weight_bits:
        layers = [name for name, layer in adapter.model.named_modules() if packs(layer, job.recipe.weight_bits)]
        trained_layers(adapter, plan, layers, targets=job.recipe.scale_targets)  # refuses a part that no layer is in
    return plan
