"""What is decided before anything is loaded: resolution, patches, and the blocks that are skipped."""

from __future__ import annotations

from pocketune.errors import PlanError
from pocketune.methods.lora import check_targets
from pocketune.models.base import SkipConnected
from pocketune.phases.state import Job
from pocketune.plan.blocks import BlockPlan
from pocketune.plan.selection import SELECTION_FILE, selection_of
from pocketune.plan.skipping import plan_for
from pocketune.sample import check_side


def check_resolution(job: Job) -> None:
    """Refuse a resolution that the model cannot work at, and patches that do not fit it."""
    check_side(job.folder, job.resolution)
    unit = job.folder.resolution_unit
    _ = job.patches
    if job.recipe.gradient == "mixed" and (job.low_resolution % unit or job.low_resolution >= job.patches.smallest):
        msg = (
            f"low_resolution {job.low_resolution} does not fit: expected a multiple of {unit} below that of the "
            f"training images, {job.patches.smallest}. Leave low_resolution out to take half."
        )
        raise PlanError(msg)


def plan_blocks(job: Job) -> BlockPlan:
    """Which blocks are skipped; refuses what makes no sense for the architecture, LoRA targets among it."""
    adapter = job.folder.empty_denoiser()
    selection = selection_of(job.folder) if job.recipe.skip.startswith("auto") else None
    plan = plan_for(adapter, job.recipe.skip, use_residuals=job.recipe.use_residuals, selection=selection)
    if job.recipe.method == "lora":
        check_targets(adapter, blocks=plan.kept, targets=job.recipe.lora_targets)
    if job.recipe.skip.startswith("auto") and not isinstance(adapter, SkipConnected):
        job.chosen_by = (
            f"masking text in this model ({SELECTION_FILE})"
            if selection
            else f"the proportions found for FLUX; no {SELECTION_FILE} of these weights lies in the model's folder"
        )
    return plan
