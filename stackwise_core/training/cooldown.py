"""The cool-down of a stage in the library: what its loss would be if its rate had decayed."""

from __future__ import annotations

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StageInterruptedError
from stackwise_core.model.snapshot import Snapshot
from stackwise_core.stages.stages import StageSpec, cooled
from stackwise_core.training.call import Call
from stackwise_core.training.in_memory import stage_inputs, validation_loss_of
from stackwise_core.training.training import Hooks, TrainingState, end_stage, train_stage


def cool_down(call: Call, config: StackWiseConfig, spec: StageSpec, hooks: Hooks, state: TrainingState) -> float:
    """Train on from the last step of a stage while the rate decays, return the validation loss, and undo it.

    A stop is one after that last step: the cool-down begins anew then.
    """
    builder, training = call.builder, config.training
    longer = cooled(spec, config.validation.cooldown_steps, training.decay, training.min_learning_rate)
    before = Snapshot.of(builder.build_rack(), spec.anatomy, builder.channels)
    try:
        inputs = stage_inputs(builder, config, longer, call.dataloader, state=state, record=False)
        train_stage(inputs, Hooks(should_stop=hooks.should_stop))
        builder.channels.update(end_stage(inputs.model, inputs.first_batches))
        return validation_loss_of(builder, config, spec, call.validation or ())
    except StageInterruptedError:
        hooks.on_checkpoint(state)
        stopped = f"stopped on request while stage {spec.index} cooled down; {hooks.go_on}"
        raise StageInterruptedError(stopped, state) from None
    finally:
        before.restore(builder.build_rack(), builder.channels)
