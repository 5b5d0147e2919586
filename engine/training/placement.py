"""Placement: bring a model, its loss and its optimizers to the device, and compile the model."""

import torch

from offloop.engine.data.batches import to_device, use_channels_last
from offloop.engine.training.program import TrainingProgram


def prepare_model(program: TrainingProgram) -> None:
    """Move everything that training updates to the device; compile the model the first time. Training thread."""
    device, config = program.device, program.config
    program.model.to(device)
    if isinstance(program.loss, torch.nn.Module):
        program.loss.to(device)  # its class weights, for example
    for optimizer in program.optimizers.values():
        for state in optimizer.state.values():
            for name, value in state.items():
                # A step counter may live on the CPU while its parameters are elsewhere.
                if not isinstance(value, torch.Tensor) or value.dim():
                    state[name] = to_device(value, device)
    if config.channels_last:
        use_channels_last(program.model)
    if config.compile and not program._is_compiled:
        program.model.compile(**(config.compile if isinstance(config.compile, dict) else {}))
        program._is_compiled = True
