"""Side4Video for retrieval: both towers with every gradient; heads, losses, metrics, optimizer.

Three kinds of files: the network on CLIP, up to its loss; the towers on EVA, with given gradients
of what comes out; and one without a network, of everything behind the towers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dist_jax import losses, optim, retrieval_metrics
from dist_jax.models import converted, side4video_params, side4video_retrieval
from dist_jax.models import side4video_retrieval_params as retrieval_params
from dist_jax.models.api import ParamGroup
from dist_jax.models.params import Row, Tree, export_tree, import_tree
from dist_jax.similarity import Texts, Videos, decorrelation, similarity
from dist_jax.tasks.retrieve import Retrieve
from tools.parity import side4video
from tools.parity.golden import Golden, is_gradient

ARCHS = {'clip_retrieval': 'clip', 'eva_retrieval': 'eva'}
# The tower on EVA is ill-conditioned: the recording lies 1.3e-5 (outputs) and 4.7e-5 (gradients)
# from the authors' own run in float64.
EVA_BOUNDS = (5e-5, 2e-4)
_ROOT = 'clip.'

# Of the file without a network: what goes in.
_GIVEN = (
    'heads/text_feat',
    'heads/text_mask',
    'heads/video_feat',
    'heads/video_mask',
    'ce/sim',
    'metrics/square/sim',
    'metrics/multi/sim',
    'metrics/multi/cut_off_points',
    # What the release makes of ties counts several ranks for a row, and is not to be reproduced.
    'metrics/ties/sim',
    'metrics/ties/official',
    'metrics/ties/official_cols',
    # Compared in the tests of schedules and of frames; here the release repeats one frame of short
    # videos, ours repeat all.
    'recognition_lr/trace',
    'samplers/recognition_eval',
    'samplers/retrieval_uniform',
)
_INTERACTIONS = {  # recorded name -> interaction, whether the mask of frames counts, weight of CDCR
    'meanP': ('meanP', False, 0.0),
    'wti_clip': ('wti', False, 0.0),
    'wti_eva': ('wti', True, 0.0),
    'wti_clip_cdcr': ('wti', False, 1e-3),
    'wti_eva_cdcr': ('wti', True, 1e-3),
}


def matches(golden: Golden) -> bool:
    """Whether the file records a retrieval network of Side4Video, or what is behind one."""
    return golden.config.get('arch') in ARCHS or _is_heads(golden)


def _is_heads(golden: Golden) -> bool:
    return 'heads/text_feat' in golden.tensors


def is_eva(golden: Golden) -> bool:
    """Whether it records the towers on EVA."""
    return golden.config.get('arch') == 'eva_retrieval'


def given(golden: Golden) -> frozenset[str]:
    """Tensors outside of the usual sections that nobody has to reproduce."""
    if not _is_heads(golden):
        return frozenset()
    inside = {
        name
        for name in golden.tensors
        if name.startswith('bertadam/') and name.endswith(('/init', '/grads'))
    }
    return frozenset((*_GIVEN, *inside))


def zero(golden: Golden) -> frozenset[str]:
    """Gradients that are zero on paper, where a file does not say so: a softmax has no level."""
    names = (name for name in golden.tensors if _is_heads(golden) and is_gradient(name))
    return frozenset(name for name in names if name.endswith('_weight_fc.2.bias'))


def run(golden: Golden) -> dict[str, np.ndarray]:
    """Reproduces what a file records.

    Raises:
      ValueError: recorded parameters and recorded sizes contradict each other.
    """
    if _is_heads(golden):
        return _run_heads(golden.tensors) | _run_metrics(golden.tensors) | _run_optimizer(golden)
    return _run_towers(golden)


def _run_towers(golden: Golden) -> dict[str, np.ndarray]:
    # Parameters of EVA's towers are recorded without the root of all names, and without heads.
    root = '' if any(name.startswith(f'params/{_ROOT}') for name in golden.tensors) else _ROOT
    tensors = {
        f'{root}{name}': value
        for section in ('params', 'buffers')
        for name, value in golden.section(section).items()
    }
    hparams = retrieval_params.infer_hparams(tensors)
    abstract = retrieval_params.abstract_variables(hparams)
    rows = retrieval_params.retrieval_rows(hparams)
    tensors = _without_heads(rows, abstract) | tensors
    tree = import_tree(tensors, rows, abstract)
    found = {converted.COLLECTIONS: side4video_params.COLLECTIONS}
    variables = jax.tree.map(jnp.asarray, converted.variables(tree, found))

    backbone, frozen = _backbone(golden, root, hparams)
    model = side4video_retrieval.build(
        backbone,
        num_frames=golden.config['T'],
        tap_every=golden.config['layers'] // hparams['depth'],
        dtype=jnp.float32,
        **side4video_params.build_options(hparams),
    )
    inputs = golden.section('inputs')
    task = Retrieve(num_words=inputs['input_ids'].shape[1])
    batch = {
        'video': jnp.asarray(inputs['video']),
        'tokens': jnp.asarray(inputs['input_ids'].astype(np.int32)),
    }
    size = len(inputs['video'])

    def loss_of(outputs: Tree) -> jax.Array:
        if 'cotangent_video' in inputs:
            products = (
                outputs['frames'] * inputs['cotangent_video'],
                outputs['words'] * inputs['cotangent_text'],
            )
            return sum(product.sum() for product in products)
        targets = {'word_mask': jnp.asarray(inputs['text_mask'], jnp.float32)}
        targets['video'] = jnp.arange(size)
        return task.loss(outputs, targets, jnp.ones(size)).mean()

    def apply(params: Tree, stats: Tree, features: Tree, train: bool) -> tuple[jax.Array, Any]:
        outputs, updated = model.net.apply(
            {'params': params, **stats},
            features,
            train=train,
            intermediates=True,
            mutable=list(stats),
        )
        return loss_of(outputs), (outputs, updated)

    @jax.jit
    def all_of(variables: Tree, frozen: Tree, batch: Tree) -> tuple[Any, ...]:
        stats = dict(variables)
        params, features = stats.pop('params'), model.inputs(frozen, batch)
        _, (tested, _) = apply(params, stats, features, False)
        trained = jax.value_and_grad(apply, has_aux=True)(params, stats, features, True)
        return tested, trained

    tested, ((loss, (outputs, updated)), grads) = jax.device_get(all_of(variables, frozen, batch))
    ours = _forward('eval', tested) | _forward('train', outputs) | {'train/loss': loss}
    if 'text_mask' in inputs:
        ours['eval/logits'] = np.asarray(similarity(*_embedded(tested, inputs['text_mask'])))
    exported = export_tree(converted.stored_tree({'params': grads, **updated}), rows)
    for name, value in exported.items():
        name = name.removeprefix(root)
        if name.rpartition('.')[2].startswith('running_'):
            ours[f'train_buffers/{name}'] = value
        else:
            ours[f'grads/{name}'] = value
            ours[f'grads_norm/{name}'] = np.sqrt(np.square(value.astype(np.float64)).sum())
    return ours


def _without_heads(rows: list[Row], abstract: Tree) -> dict[str, np.ndarray]:
    """Zeros for all tensors: what a file of towers alone does not hold changes nothing."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    return export_tree(zeros, rows)


def _backbone(golden: Golden, root: str, hparams: Mapping[str, Any]) -> tuple[Any, Tree]:
    """The frozen part, as files of recognition networks hold it, with the sizes of the texts."""
    removed = '' if root else _ROOT
    projection = {
        f'backbone/{name}': value
        for name, value in golden.section('params').items()
        if name.startswith(('visual.norm.', 'visual.head.'))
    }
    tensors = projection | {
        f'backbone/{name.removeprefix(removed)}': value
        for name, value in golden.section('backbone').items()
    }
    kind = ARCHS[golden.config['arch']]
    config = golden.config | {'arch': kind, 'heads': golden.config['width'] // 64}
    inside = dataclasses.replace(golden, tensors=tensors, config=config)
    backbone, frozen = (side4video.eva_inside if kind == 'eva' else side4video.clip_inside)(inside)
    known = {field.name for field in dataclasses.fields(backbone.spec)}
    texts = {name: size for name, size in hparams.items() if name in known and 'text' in name}
    texts |= {name: hparams[name] for name in ('embed_dim', 'vocab_size')}
    spec = dataclasses.replace(backbone.spec, **texts)
    return dataclasses.replace(backbone, spec=spec), frozen


def _embedded(outputs: Tree, text_mask: np.ndarray) -> tuple[Texts, Videos]:
    mask = jnp.asarray(text_mask, jnp.float32)
    texts = Texts(outputs['words'], mask, outputs['word_logits'], outputs['pooled'])
    logits = outputs['frame_logits']
    return texts, Videos(outputs['frames'], jnp.ones_like(logits), logits)


def _forward(mode: str, outputs: Tree) -> dict[str, np.ndarray]:
    """What came out, under its recorded names."""
    size = round(outputs['stem'].shape[2] ** 0.5)

    def grid(x: np.ndarray) -> np.ndarray:
        return rearrange(x, 'b t (h w) c -> b t h w c', h=size)

    return {
        f'{mode}/text_hidden': outputs['words'],
        f'{mode}/text_eot': outputs['pooled'],
        f'{mode}/video_frames': outputs['frames'],
        f'{mode}/x_side/stem': grid(outputs['stem']),
        **{f'{mode}/x_side/{i}': grid(x) for i, x in enumerate(outputs['layers']['stream'])},
    }


def _run_heads(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Similarities, losses and gradients of given embeddings."""

    def weights(name: str) -> Tree:
        def linear(number: int) -> dict[str, jax.Array]:
            of = f'heads/params/{name}_weight_fc.{number}'
            return {
                'kernel': jnp.asarray(tensors[f'{of}.weight'].T),
                'bias': jnp.asarray(tensors[f'{of}.bias']),
            }

        return {'fc1': linear(0), 'fc2': linear(2)}

    given = {
        'text_feat': jnp.asarray(tensors['heads/text_feat']),
        'video_feat': jnp.asarray(tensors['heads/video_feat']),
        'logit_scale': jnp.asarray(tensors['heads/params/logit_scale']),
        'text': weights('text'),
        'video': weights('video'),
    }
    text_mask, video_mask = (jnp.asarray(tensors[f'heads/{of}_mask']) for of in ('text', 'video'))
    everyone = jnp.ones(len(text_mask))
    ours: dict[str, np.ndarray] = {}
    for name, (interaction, masked, cdcr) in _INTERACTIONS.items():

        def embedded(given: Tree, masked: bool = masked) -> tuple[Texts, Videos]:
            words, frames = given['text_feat'], given['video_feat']
            weigh = side4video_retrieval.weigh
            texts = Texts(words, text_mask, weigh(given['text'], words), words[:, 0])
            mask = video_mask if masked else jnp.ones_like(video_mask)
            return texts, Videos(frames, mask, weigh(given['video'], frames))

        def loss_of(
            given: Tree, interaction: str = interaction, cdcr: float = cdcr, embedded=embedded
        ) -> tuple[jax.Array, jax.Array]:
            both = embedded(given)
            scores = similarity(*both, interaction)
            logits = scores * jnp.exp(given['logit_scale'])
            loss = losses.contrastive(logits, everyone).mean()
            return loss + (cdcr and cdcr * decorrelation(*both, everyone)), (scores, logits)

        (loss, (scores, logits)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(given)
        scale = jnp.exp(given['logit_scale']) if interaction == 'meanP' else 1.0
        ours |= {
            f'{name}/loss': loss,
            f'{name}/logits_train': logits,
            f'{name}/logits_eval': scores * scale,
            **_named_gradients(f'{name}/grads', grads),
        }
        if cdcr:
            value, grads = jax.jit(
                jax.value_and_grad(lambda given, of=embedded: decorrelation(*of(given), everyone))
            )(given)
            ours |= {f'{name}/cdcr': value, **_named_gradients(f'{name}/cdcr_grads', grads)}
    matrix = jnp.asarray(tensors['ce/sim'])
    ours['ce/loss'], ours['ce/grad'] = jax.value_and_grad(
        lambda logits: losses.contrastive(logits, jnp.ones(len(logits))).mean()
    )(matrix)
    return {name: np.asarray(value) for name, value in ours.items()}


def _named_gradients(section: str, grads: Tree) -> dict[str, jax.Array]:
    found = {name: grads[name] for name in ('text_feat', 'video_feat', 'logit_scale')}
    found['text_feat0'] = grads['text_feat'][:, 0]
    for of in ('text', 'video'):
        for number, ours in ((0, 'fc1'), (2, 'fc2')):
            found[f'{of}_weight_fc.{number}.weight'] = grads[of][ours]['kernel'].T
            found[f'{of}_weight_fc.{number}.bias'] = grads[of][ours]['bias']
    return {f'{section}/{name}': value for name, value in found.items()}


def _run_metrics(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ranks, recalls, medians and means of given similarities."""
    ours: dict[str, np.ndarray] = {}
    groups = np.diff(tensors['metrics/multi/cut_off_points'], prepend=0)
    square = len(tensors['metrics/square/sim'])
    for name, right in (
        ('square', np.arange(square)),
        ('multi', np.repeat(np.arange(len(groups)), groups)),
    ):
        found = retrieval_metrics.retrieval(tensors[f'metrics/{name}/sim'], right)
        for way, ranks in (('t2v', found.text_to_video), ('v2t', found.video_to_text)):
            median = ranks.median
            if (name, way) == ('multi', 't2v'):
                ours[f'metrics/{name}/t2v_median_numpy'] = np.float64(median)
                median = np.quantile(ranks.expected, 0.5, method='lower')
            recalls = [100 * ranks.recall(most) for most in (1, 5, 10)]
            ours[f'metrics/{name}/{way}'] = np.array([*recalls, median, ranks.mean])
            ours[f'metrics/{name}/{way}_rank0'] = ranks.higher
    return ours


def _run_optimizer(golden: Golden) -> dict[str, np.ndarray]:
    """Twelve steps of BertAdam on given gradients, and its schedule."""
    tensors, said = golden.tensors, golden.metadata['bertadam']
    names = tuple(said['weight_decay'])
    largest = max(said['weight_decay'].values())
    settings = optim.OptimizerSettings(
        peak_lr=said['lr'],
        warmup_start_lr=0.0,
        warmup_steps=said['warmup'] * said['t_total'],
        total_steps=said['t_total'],
        warmup='peak',
        weight_decay=largest,
        b1=said['b1'],
        b2=said['b2'],
        eps=said['eps'],
        clip_norm=said['global_clip'],
        clip_tensor_norm=said['max_grad_norm'],
        name='bertadam',
    )
    groups = [
        ParamGroup(
            f'^{name}$',
            said['weight_decay'][name] / largest,
            said['coef_lr_clip'] if name.startswith('clip') else 1.0,
        )
        for name in names
    ]
    params = {name: jnp.asarray(tensors[f'bertadam/{name}/init']) for name in names}
    optimizer = optim.make_optimizer(params, groups, settings)

    @jax.jit
    def step(carry: Any, grads: Tree) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    grads = {name: jnp.asarray(tensors[f'bertadam/{name}/grads']) for name in names}
    _, trace = jax.lax.scan(step, (params, optimizer.init(params)), grads)
    length, share = (float(part[1:]) for part in ('t100', 'w0.1'))
    rate = optim.make_schedule(
        dataclasses.replace(
            settings, peak_lr=1.0, warmup_steps=share * length, total_steps=int(length)
        )
    )
    return {
        **{f'bertadam/{name}/after': np.asarray(trace[name]) for name in names},
        'bertadam/multiplier_t100_w0.1': np.asarray(rate(jnp.arange(length))),
    }
