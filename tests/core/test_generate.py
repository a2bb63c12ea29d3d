"""Parallel decoding: what the model is asked at each step, which images come out, editing, and settings."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core.teacher import decoded_logits

from engine import generate as engine
from engine.decoding import Progress, edit_tokens, generate_tokens, whole_order
from engine.generate import generate_images, resolve_settings
from engine.sampling import Sampling
from models.lpd import LPD, NO_LABEL
from models.weights import save_weights, state_digest
from orders.lpd_order import make_orders, random_orders
from orders.policies import Confident
from orders.schedule import cosine_group_sizes

KINDS = ["lpd", "random", "raster", "halton"]
GROUPS = (1, 3, 5, 7)
GREEDY = Sampling(temperature=0)
L = 16


def orders_of(image_ids, kind="lpd"):
    return torch.from_numpy(make_orders(kind, len(image_ids), GROUPS, 4, image_ids=image_ids).astype("int64"))


class MockModel:
    """Has the methods that decoding uses, known logits, and a record of what it was asked.

    With a label, position p of 16 has code `(5 * p + 1) % 32` as the likeliest. Without one, all codes are
    equal. A context row is (label or code, its position or -1 for a label); a query is (-2, its position).
    """

    config = SimpleNamespace(num_tokens=L)
    pos_embed = torch.zeros(1)

    def __init__(self, cond=None, uncond=None):
        likeliest = torch.nn.functional.one_hot((5 * torch.arange(L) + 1) % 32, 32).float()
        self.cond = likeliest if cond is None else cond  # [L, V]
        self.uncond = torch.zeros_like(self.cond) if uncond is None else uncond  # [L, V]
        self.batches, self.contexts, self.positions = [], [], []

    def new_kv_cache(self, batch):
        self.batches.append(batch)
        return torch.empty(1, 1 + L, batch, 1)

    first_rows, next_rows = LPD.first_rows, LPD.next_rows

    def embed_labels(self, labels):
        self.has_label = labels != NO_LABEL
        return torch.stack([labels, torch.full_like(labels, -1)], dim=-1)[None]  # [1, R, 2]

    def embed_tokens(self, tokens, positions):
        return torch.stack([tokens, positions], dim=-1)  # [c, B, 2]

    def query_table(self):
        return torch.stack([torch.full((L,), -2), torch.arange(L)], dim=-1)  # [L, 2]

    def features(self, x, mask, kv_cache):
        context, positions = x[: mask.context], x[mask.context :, :, 1]
        self.contexts.append(context.transpose(0, 1))  # [R, c, 2]
        self.positions.append(positions.T)  # [R, n]
        return positions

    def head(self, positions):
        return torch.where(self.has_label[:, None], self.cond[positions], self.uncond[positions])  # [n, R, V]


def generate(model, sampling=GREEDY, n=3, **options):
    order = orders_of(range(n))
    return generate_tokens(model, torch.arange(n) % 5, order, GROUPS, sampling, **options), order


# What the model is asked.


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_is_queried_once_in_order(kind):
    model, order = MockModel(), orders_of(range(3), kind)
    generate_tokens(model, torch.arange(3), order, GROUPS)
    assert [positions.shape[1] for positions in model.positions] == list(GROUPS)
    assert torch.equal(torch.cat(model.positions, dim=1), order)
    assert torch.equal(order.sort(dim=1).values, torch.arange(L).expand(3, L))
    tokens, _ = generate(MockModel())  # greedy; they come back in raster order
    assert torch.equal(tokens, ((5 * torch.arange(L) + 1) % 32).expand(3, L))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_context_is_the_class_token_then_the_group_before(cfg):
    model = MockModel()
    tokens, order = generate(model, Sampling(cfg=cfg, temperature=0))
    assert torch.equal(model.contexts[0][:3, 0], torch.tensor([[0, -1], [1, -1], [2, -1]]))
    for context, positions in zip(model.contexts[1:], model.positions, strict=False):
        group = torch.stack([tokens.gather(1, positions[:3]), positions[:3]], dim=-1)
        assert torch.equal(context, group.repeat(len(context) // 3, 1, 1))


@pytest.mark.parametrize("cfg, has_label", [(1.0, [True] * 3), (4.0, [True] * 3 + [False] * 3)])
def test_only_guidance_adds_a_branch_without_labels(cfg, has_label):
    model = MockModel()
    generate(model, Sampling(cfg=cfg))
    assert model.has_label.tolist() == has_label and model.batches == [len(has_label)]
    for positions in model.positions:
        assert torch.equal(positions, positions[:3].repeat(len(has_label) // 3, 1))


@pytest.mark.parametrize("cfg, schedule, first", [(1, "linear", 16), (5, "linear", 7), (5, "constant", 0)])
def test_guidance_scale_belongs_to_the_slot(cfg, schedule, first):
    """Code 0 leads by 2.5 without a label and by 1.5 with one: by 2.5 - s under guidance s, so code 1 leads
    where s > 2.5. Linear: 1 + 4 t / 16 > 2.5 from slot 7 on (slot 6 is a tie, which argmax gives to code 0).
    """
    model = MockModel(torch.tensor([1.5, 0.0]).expand(L, 2), torch.tensor([2.5, 0.0]).expand(L, 2))
    tokens, order = generate(model, Sampling(cfg, schedule, temperature=0))
    assert torch.equal(tokens.gather(1, order), (torch.arange(L) >= first).long().expand(3, L))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"order": torch.arange(15).repeat(2, 1)}, r"order is \[2, 15\], needed is \[2, 16\]"),
        ({"group_sizes": (1, 3, 5, 6)}, "sum to 15, but 16 of 16 tokens"),
        ({"group_sizes": (1, 0, 8, 7)}, r"1 or more, not \[1, 0, 8, 7\]"),
        ({"image_ids": torch.tensor([3])}, "1 image_ids for 2 labels"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    model = MockModel()
    arguments = {"order": torch.arange(L).repeat(2, 1), "group_sizes": GROUPS, **change}
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, torch.zeros(2, dtype=torch.int64), **arguments)
    assert model.positions == []


# With a real model.


def test_noise_depends_on_seed_and_image_id(tiny_lpd):
    labels, order = torch.zeros(3, dtype=torch.int64), orders_of([0, 0, 0])
    tokens = generate_tokens(tiny_lpd, labels, order, GROUPS)
    assert (tokens[0] != tokens[1]).any()
    assert torch.equal(generate_tokens(tiny_lpd, labels, order, GROUPS, image_ids=torch.arange(3)), tokens)
    for other in ({"seed": 1}, {"image_ids": torch.tensor([9, 10, 11])}):
        assert (generate_tokens(tiny_lpd, labels, order, GROUPS, **other) != tokens).any(dim=1).all()


def test_images_are_the_decoded_tokens(tiny_lpd, tiny_vq):
    labels, order = torch.arange(3), orders_of(range(3))
    images = generate_images(tiny_lpd, tiny_vq, labels, order, GROUPS, seed=5)
    with torch.no_grad():
        pixels = tiny_vq.decode(generate_tokens(tiny_lpd, labels, order, GROUPS, seed=5))
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert images.shape == (3, 8, 8, 3) and torch.equal(images, expected.to(torch.uint8))


# Editing.

LABELS = torch.tensor([0, 3, NO_LABEL])


class Recorder(LPD):
    """An LPD that records the rows and the mask's context rows of its decoding steps."""

    def features(self, x, mask, kv_cache):
        self.steps.append((x.shape[1], mask.context, len(x) - mask.context))
        return super().features(x, mask, kv_cache)


def random_keep(count, n=3):
    """`count` random tokens of each of n images: bool [n, L]."""
    return torch.rand(n, L, generator=torch.Generator().manual_seed(count)).argsort(dim=1) < count


def random_tokens(n=3):
    return torch.randint(32, (n, L), generator=torch.Generator().manual_seed(0))


def orders_beside(keep, sizes, kind="lpd", ids=None):
    orders = make_orders(kind, len(keep), sizes, 4, known=keep.numpy(), image_ids=ids)
    return torch.from_numpy(orders.astype("int64"))


def edit(model, count, sampling=GREEDY, steps=3, kind="lpd", **options):
    """Three edited images [3, L], their tokens before, which were kept, and the group sizes."""
    keep, tokens, sizes = random_keep(count), random_tokens(), cosine_group_sizes(L - count, steps)
    order = orders_beside(keep, sizes, kind)
    return edit_tokens(model, tokens, keep, LABELS, order, sizes, sampling, **options), tokens, keep, sizes


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(cfg=3.0), GREEDY], ids=str)
@pytest.mark.parametrize("count", [1, 7, 14])
def test_kept_tokens_stay_and_the_others_fill_in_by_groups(tiny_lpd, count, sampling):
    seen = []
    on_group = lambda partial, slots, _: seen.append((partial.clone(), slots))  # noqa: E731
    edited, tokens, keep, sizes = edit(tiny_lpd, count, sampling, steps=2, on_group=on_group)
    assert torch.equal(edited[keep], tokens[keep])
    assert (edited[~keep] != tokens[~keep]).any()
    assert [slots for _, slots in seen] == [count + 1, L]
    whole = whole_order(keep, orders_beside(keep, sizes))
    for partial, slots in seen:
        filled = torch.zeros_like(keep).scatter(1, whole[:, :slots], True)
        assert torch.equal(partial, torch.where(filled, edited, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(3.0, "constant", top_k=9)], ids=str)
def test_keeping_nothing_is_plain_generation(tiny_lpd, kind, sampling):
    edited, _, _, sizes = edit(tiny_lpd, 0, sampling, steps=4, kind=kind, seed=5)
    order = torch.from_numpy(make_orders(kind, 3, sizes, 4).astype("int64"))
    assert torch.equal(edited, generate_tokens(tiny_lpd, LABELS, order, sizes, sampling, seed=5))


def test_keeping_everything_is_a_copy(tiny_lpd):
    tokens, keep = random_tokens(), torch.ones(3, L, dtype=torch.bool)
    edited = edit_tokens(tiny_lpd, tokens, keep, LABELS, torch.empty(3, 0, dtype=torch.int64), ())
    assert torch.equal(edited, tokens) and edited.data_ptr() != tokens.data_ptr()


@pytest.mark.parametrize("kind", ["lpd", "random", "raster"])
@pytest.mark.parametrize("count", [0, 1, 7, 14])
def test_cached_step_by_step_decoding_equals_one_masked_training_pass(tiny_lpd, count, kind):
    """Kept tokens are its first group. 1e-5: the same fp32 sums in another order; logits are of size 1."""
    edited, _, keep, sizes = edit(tiny_lpd, count, steps=2, kind=kind)
    whole = whole_order(keep, orders_beside(keep, sizes, kind))
    with torch.no_grad():
        expected = tiny_lpd(edited, LABELS, whole, (count, *sizes) if count else sizes)[:, count:]
    assert torch.equal(expected.argmax(dim=-1), edited.gather(1, whole)[:, count:])  # `edit` is greedy
    logits = decoded_logits(tiny_lpd, edited, LABELS, whole, sizes, known=count)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_kept_tokens_enter_in_one_pass_after_the_class_token(tiny_lpd):
    model = Recorder(tiny_lpd.config).eval()
    model.load_state_dict(tiny_lpd.state_dict())
    model.steps = []
    *_, sizes = edit(model, 6, Sampling(cfg=2.0))
    assert sizes == (1, 4, 5)
    assert model.steps == [(6, 1, 0), (6, 6, 1), (6, 1, 4), (6, 4, 5)]


def test_kept_tokens_count_as_slots_of_guidance(tiny_lpd, monkeypatch):
    """Linear guidance of 5 after 12 of 16 kept tokens starts at 1 + 4 * 12 / 16."""
    scales = []
    monkeypatch.setattr("engine.decoding.guide", lambda cond, uncond, s: scales.extend(s.tolist()) or cond)
    edit(tiny_lpd, 12, Sampling(cfg=5.0), steps=2)
    assert scales == [4.0, 4.25, 4.5, 4.75]


@pytest.mark.parametrize("count", [0, 6])
@pytest.mark.parametrize("sampling", [Sampling(cfg=3.0), Sampling(top_k=5, top_p=0.9)], ids=str)
def test_an_image_does_not_depend_on_the_batch(tiny_lpd, sampling, count):
    """Generated (nothing kept) or edited, in batches of 8, 3 and 1."""
    keep, tokens, sizes = random_keep(count, n=8), random_tokens(8), cosine_group_sizes(L - count, 3)
    results = []
    for size in (8, 3, 1):
        batches = []
        for b in torch.arange(8).split(size):
            order = orders_beside(keep[b], sizes, ids=b.numpy())
            images = tokens[b], keep[b], b % 5, order, sizes
            batches.append(edit_tokens(tiny_lpd, *images, sampling, seed=3, image_ids=b))
        results.append(torch.cat(batches))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


KEEP, OTHERS = torch.arange(L).expand(3, L) < 6, torch.arange(6, L).repeat(3, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(3, 15, dtype=torch.int64)}, r"\[3, 15\].* needed is \[3, 16\]"),
        ({"keep": KEEP[:2]}, r"keep is \[2, 16\]"),
        ({"keep": torch.arange(L) < torch.tensor([[6], [7], [6]])}, "from 6 to 7 tokens"),
        ({"order": OTHERS[:, 1:]}, r"order is \[3, 9\], needed is \[3, 10\]"),
        ({"order": OTHERS.clamp(min=7)}, "each position that is not kept once"),
        ({"group_sizes": (1, 8)}, "sum to 9, but 10 of 16 tokens are unknown"),
    ],
)
def test_wrong_edits_are_refused(tiny_lpd, change, message):
    arguments = {"tokens": random_tokens(), "keep": KEEP, "order": OTHERS, "group_sizes": (1, 9), **change}
    with pytest.raises(ValueError, match=message):
        edit_tokens(tiny_lpd, labels=LABELS, **arguments)


# Orders that are decided in the loop.


class Backwards:
    """A policy that takes the highest positions that are left, and notes what it was handed."""

    looks = False

    def __init__(self):
        self.handed = []

    def __call__(self, size, progress):
        self.handed.append(progress)
        return progress.cells.argsort(dim=1, descending=True)[:, :size]


def test_a_policy_gives_what_its_order_gives(tiny_lpd):
    """With guidance, and with known tokens; it is handed what is known when each group's turn comes."""
    policy, sampling, backwards = Backwards(), Sampling(cfg=3.0), torch.arange(L - 1, -1, -1).expand(3, L)
    tokens, order = generate_tokens(tiny_lpd, LABELS, policy, GROUPS, sampling, return_order=True)
    assert torch.equal(order, backwards)
    assert torch.equal(tokens, generate_tokens(tiny_lpd, LABELS, backwards, GROUPS, sampling))
    for progress, slot in zip(policy.handed, (0, 1, 4, 9), strict=True):
        filled = torch.zeros(3, L, dtype=torch.bool).scatter(1, backwards[:, :slot], True)
        assert torch.equal(progress.filled, filled) and progress.logits is None
        assert torch.equal(progress.tokens, torch.where(filled, tokens, 0))
        assert torch.equal(progress.cells.sort(dim=1).values, (~filled).nonzero()[:, 1].view(3, -1))
    keep, given = random_keep(6), (random_tokens(), random_keep(6), LABELS)
    order = (~keep).nonzero()[:, 1].view(3, -1).flip(1)
    expected = edit_tokens(tiny_lpd, *given, order, (1, 4, 5), sampling)
    assert torch.equal(edit_tokens(tiny_lpd, *given, Backwards(), (1, 4, 5), sampling), expected)


class Looking(Backwards):
    looks = True


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(cfg=3.0)], ids=str)
def test_rows_that_look_see_the_context_alone_and_change_nothing(tiny_lpd, sampling):
    """What is seen of a cell is its logit as a group of one that follows all groups but the last. 3e-5: the
    same fp32 sums in another order, times the guidance scale."""
    policy, backwards = Looking(), torch.arange(L - 1, -1, -1).expand(3, L)
    tokens = generate_tokens(tiny_lpd, LABELS, policy, GROUPS, sampling)
    assert torch.equal(tokens, generate_tokens(tiny_lpd, LABELS, backwards, GROUPS, sampling))
    for step, progress in enumerate(policy.handed[1:]):
        before, slot = sum(GROUPS[:step]), sum(GROUPS[: step + 1])
        for i, cell in enumerate(progress.cells[0].tolist()):
            others = [p for p in range(L - before - 1, -1, -1) if p != cell]
            order = torch.cat([backwards[0, :before], torch.tensor([cell, *others])]).expand(3, L)
            sizes = (*GROUPS[:step], 1, L - before - 1)
            cond, uncond = (
                decoded_logits(tiny_lpd, tokens, labels, order, sizes)[:, before]
                for labels in (LABELS, torch.full((3,), NO_LABEL))
            )
            alone = uncond + (1 + (sampling.cfg - 1) * slot / L) * (cond - uncond)
            torch.testing.assert_close(progress.logits[:, i], alone, rtol=0, atol=3e-5)


def test_confident_takes_the_least_entropy_apart():
    """Cells 5, 6 and 15 are certain, 6 less than 5; 5 and 6 are neighbours on the 4x4 grid."""
    sharpness = torch.ones(1, L)
    sharpness[0, [5, 6, 15]] = torch.tensor([9.0, 8.0, 7.0])
    logits = sharpness[..., None] * torch.eye(4)[0]
    cells = torch.arange(L)[None]
    progress = Progress(cells, torch.rand(1, L), logits, None, None)
    assert Confident(4, 2.0)(2, progress).tolist() == [[5, 15]]
    assert Confident(4, 1.0)(2, progress).tolist() == [[5, 6]]
    everything = Confident(4, 2.0)(L, progress)  # none is left that is far enough: the near ones follow
    assert torch.equal(everything.sort(dim=1).values, cells)


def test_an_image_of_a_policy_does_not_depend_on_the_batch(tiny_lpd):
    given = GROUPS, Sampling(cfg=3.0, top_p=0.9)
    ids = torch.arange(8)
    together = generate_tokens(tiny_lpd, ids % 5, Confident(4, 1.5), *given, return_order=True, seed=3)
    assert len({tuple(row) for row in together[1].tolist()}) > 1
    for i in ids.split(1):
        own = {"return_order": True, "seed": 3, "image_ids": i}
        alone = generate_tokens(tiny_lpd, i % 5, Confident(4, 1.5), *given, **own)
        assert all(torch.equal(a, b[i]) for a, b in zip(alone, together, strict=True))


# Settings.


@pytest.mark.parametrize("grid_size, steps, repulsion", [(16, 20, 2), (32, 48, 4), (4, 3, 1), (2, 2, 1)])
def test_defaults_are_the_published_settings(grid_size, steps, repulsion):
    """20 steps at 256 px and 48 at 512 px; scaled to other grids."""
    settings = resolve_settings(grid_size)
    assert settings.group_sizes == cosine_group_sizes(grid_size**2, steps)
    assert (settings.repulsion_threshold, settings.proximity_threshold) == (repulsion, 1)
    assert (settings.order, settings.sampling) == ("lpd", Sampling())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"group_sizes": (1, 14)}, "sum to 15, .* 16 tokens"),
        ({"group_sizes": (2, 14)}, "start with 1, not 2"),
        ({"group_sizes": (1, 15), "generation_steps": 3}, "--group_sizes has 2 .*--generation_steps is 3"),
        ({"generation_steps": 17}, "17 steps for 16 tokens"),
    ],
)
def test_impossible_schedules_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolve_settings(4, **given)


def test_image_i_takes_row_i_of_the_order_file(tmp_path):
    orders, path = random_orders(5, 4), tmp_path / "orders.npy"
    np.save(path, orders)
    settings = resolve_settings(4, lpd_order_file=path, num_images=5)
    assert np.array_equal(settings.orders([4, 0, 2]).numpy(), orders[[4, 0, 2]])
    with pytest.raises(ValueError, match="orders.npy has 5 orders, but 6 are needed"):
        resolve_settings(4, lpd_order_file=path, num_images=6)
    with pytest.raises(ValueError, match="orders.npy.* 16 positions.* 64 tokens"):
        resolve_settings(8, lpd_order_file=path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_an_image_depends_on_seed_and_id_alone(kind):
    settings = resolve_settings(8, order=kind, seed=4)
    together = settings.orders([0, 7, 3, 40_000])
    assert together.dtype == torch.int64
    for i, image_id in enumerate([0, 7, 3, 40_000]):
        assert torch.equal(settings.orders([image_id])[0], together[i])
    if kind != "raster":
        assert (together[0] != together[1]).any()
        assert (resolve_settings(8, order=kind, seed=5).orders([0]) != together[0]).any()


def test_settings_as_json_are_flat():
    """Evaluations in progress and their records are compared by these keys."""
    sampling = Sampling(2.0, "constant", temperature=0.5, top_k=3, top_p=0.9)
    given = {"seed": 9, "group_sizes": (1, 15), "repulsion_threshold": 0.0}
    values = resolve_settings(4, sampling=sampling, **given).as_json()
    assert json.loads(json.dumps(values)) == values == {
        "grid_size": 4, "group_sizes": [1, 15], "steps": 2, "order": "lpd", "proximity_threshold": 1.0,
        "repulsion_threshold": 0.0, "cfg": 2.0, "cfg_schedule": "constant", "temperature": 0.5, "top_k": 3,
        "top_p": 0.9, "seed": 9,
    }


def test_weights_of_another_tokenizer_are_refused(tmp_path, tiny_lpd, tiny_vq):
    save_weights(tmp_path / "vq.safetensors", tiny_vq)
    paths = tmp_path / "lpd.safetensors", tmp_path / "vq.safetensors"
    save_weights(paths[0], tiny_lpd, tokenizer_digest=state_digest(tiny_vq), class_names=list("abcde"))
    model, tokenizer, info = engine.load_pair(*paths)
    assert (model.config, tokenizer.config) == (tiny_lpd.config, tiny_vq.config)
    assert info["class_names"] == list("abcde")
    save_weights(paths[0], tiny_lpd, tokenizer_digest="0123")
    with pytest.raises(ValueError, match="--pretrained_ckpt was trained with tokenizer 0123"):
        engine.load_pair(*paths)


def test_the_tokenizer_beside_the_weights_is_used_if_there_is_one(tmp_path, tiny_lpd, tiny_vq, capsys):
    """In the folder of the weights, or in `tokenizer` beside it, where own_images.sh puts it."""
    run = tmp_path / "lpd"
    save_weights(run / "lpd.safetensors", tiny_lpd)
    paths = run / "tokenizer.safetensors", run / "../tokenizer/tokenizer.safetensors"
    with pytest.raises(ValueError, match=f"{paths[0]} and {paths[1]} do not exist"):
        engine.load_pair(run)
    for path in paths:
        save_weights(path, tiny_vq)
        assert state_digest(engine.load_pair(run)[1]) == state_digest(tiny_vq)
        assert capsys.readouterr().out == f"--vqgan_path {path}, found beside the weights\n"
        path.unlink()
    for path in paths:
        save_weights(path, tiny_vq)
    with pytest.raises(ValueError, match=f"{paths[0]} and {paths[1]} both exist"):
        engine.load_pair(run)
