"""What is refused before anything is written."""

from pathlib import Path

from lorax.config.run import RunConfig
from lorax.data.batches import BatchPlan
from lorax.devices.mesh import make_mesh
from lorax.interop.folder import resolve_base
from lorax.interop.load import check_checkpoint
from lorax.interop.peft import check_adapter, trains_base_weights
from lorax.models.decoder import CausalLM
from lorax.planning.kernels import check_kernels
from lorax.runs.model import model_shapes
from lorax.runs.setup import Inputs
from lorax.training.calendar import count_steps, plan_training
from lorax.training.optim.schedules import make_schedule


def check_weights(config: RunConfig) -> None:
    """Checks all that can be seen of the weights without reading the base model's.

    That is what files and their headers say: of a base model in a folder, and of an adapter.

    Raises:
        ValueError: Naming the file and the tensor that cannot be used.
    """
    model = config.model
    base = resolve_base(model, weights=False)
    if Path(model.name_or_path).expanduser().is_dir():
        check_checkpoint(base)
    if model.adapter:
        check_adapter(model_shapes(config, base), model.adapter)


def check_targets(config: RunConfig, base: Path) -> CausalLM:
    """Matches the adapter's settings against the model's names, without any weights.

    Returns:
        The model that trains, with shapes instead of weights.

    Raises:
        ValueError: If a setting matches nothing, a rank does not fit, or the kernels asked for
            cannot run here.
    """
    adapted = model_shapes(config, base)
    if config.train.method == "full":
        return adapted
    if "peft-portable" in config.save.export and trains_base_weights(adapted):
        raise ValueError(
            "save.export: peft-portable holds A and B only, but lora.bias or lora.modules_to_save "
            "trains other weights too; export peft or merged"
        )
    check_kernels(config, adapted)
    return adapted


def check_plan(config: RunConfig, inputs: Inputs) -> BatchPlan:
    """Plans the batches as the trainer will, and checks devices and schedule against them.

    Raises:
        ValueError: If the mesh asks for absent devices, or the schedule does not fit the run.
    """
    plan = plan_training(config, inputs.train, make_mesh(config.mesh.data).size)
    make_schedule(config.train, count_steps(config, plan))
    return plan
