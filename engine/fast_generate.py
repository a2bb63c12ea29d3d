"""Parallel decoding made fast: the steps of engine/generate.py, captured whole and replayed.

A trajectory (all steps, the draws and, for images, the tokenizer's decoder) has static shapes once batch,
schedule and mode are fixed. On a GPU it becomes one graph, which the host launches at once; on a CPU
it runs as it is, with weights laid out for products of few rows. Does not know files, pictures or printing.
"""

from collections import OrderedDict

import torch

from engine.generate import decode_steps, decoding_inputs, generate_images, generate_tokens
from models.lpd import NO_LABEL
from models.packed import packed
from util import dist
from util.images import to_uint8

PLAIN_ONLY = {"on_group", "known"}  # arguments that a captured trajectory cannot take


class Trajectory:
    """A function of static inputs, captured once: given inputs are copied in, the output is cloned out.

    Args:
        function: of the inputs. inputs: tensors whose first dimension is the batch. capture: of util.dist.
    """

    def __init__(self, function, inputs, capture):
        self.inputs = inputs
        self.replay = capture(lambda: function(*inputs))

    def __call__(self, *inputs):
        """Fewer rows than captured may be given: the others, with what they held before, are in vain."""
        for static, given in zip(self.inputs, inputs, strict=True):
            static[: len(given)].copy_(given, non_blocking=True)
        return self.replay()[: len(inputs[0])].clone()


class FastGenerator:
    """`generate_tokens` and `generate_images` of one model, with the same arguments and the same results.

    The first call with new settings or a larger batch captures a trajectory; a smaller batch is padded to the
    least one captured that it fits. Weights are captured by address: they must not move, and on a CPU not
    change, while this is in use. A call with `on_group` or `known` takes the plain path: a callback cannot be
    captured, and an edit has shapes of its own.

    Args:
        model: LPD in eval mode, on its device, in the dtype to compute in.
        tokenizer: decodes tokens [B, L] to pixels (a `VQModel` or a `FastDecoder`); None without images.
        capacity: captured trajectories that are kept; the one unused for longest goes. They share memory.
        capture: makes a function without arguments into one that replays it.
    """

    def __init__(self, model, tokenizer=None, *, capacity=8, capture=None):
        self.plain = model
        self.model = packed(model) if model.pos_embed.device.type == "cpu" else model
        self.tokenizer = tokenizer
        self.capacity = capacity
        self.capture = capture or dist.GraphCapture(model.pos_embed.device)
        self.trajectories = OrderedDict()  # (batch, what, settings) -> Trajectory, the last used at the end

    def generate_tokens(self, labels, order, group_sizes, **settings):
        """As `engine.generate.generate_tokens`."""
        if PLAIN_ONLY & settings.keys():
            return generate_tokens(self.plain, labels, order, group_sizes, **settings)
        return self._generate("tokens", labels, order, group_sizes, **settings)

    def generate_images(self, labels, order, group_sizes, **settings):
        """As `engine.generate.generate_images`."""
        if PLAIN_ONLY & settings.keys():
            return generate_images(self.plain, self.tokenizer, labels, order, group_sizes, **settings)
        return self._generate("images", labels, order, group_sizes, **settings)

    @torch.inference_mode()
    def _generate(self, what, labels, order, group_sizes, *, seed=0, image_ids=None, **settings):
        inputs = decoding_inputs(
            self.model, labels, order, group_sizes, seed=seed, image_ids=image_ids,
            cfg_schedule=settings.get("cfg_schedule", "linear"),
        )  # fmt: skip
        key = (what, tuple(group_sizes), *sorted(settings.items()))
        wide_enough = [batch for batch, known in self.trajectories if known == key and batch >= len(labels)]
        batch = min(wide_enough, default=len(labels))
        trajectory = self.trajectories.pop((batch, key), None)
        if trajectory is None:
            trajectory = self._capture(batch, what, tuple(group_sizes), settings)
        self.trajectories[batch, key] = trajectory
        while len(self.trajectories) > self.capacity:
            self.trajectories.popitem(last=False)
        return trajectory(*inputs)

    def _capture(self, batch, what, group_sizes, settings):
        def function(labels, order, words):
            tokens = decode_steps(self.model, labels, order, words, group_sizes, **settings)
            return tokens if what == "tokens" else to_uint8(self.tokenizer.decode(tokens))

        device, L = self.model.pos_embed.device, self.model.config.num_tokens
        inputs = (
            torch.full((batch,), NO_LABEL, device=device),
            torch.arange(L, device=device).repeat(batch, 1),
            torch.zeros(batch, 2, dtype=torch.int64, device=device),
        )
        return Trajectory(function, inputs, self.capture)
