"""From a program to figures: kinds of memory, names of modules, times of what has no cycles."""

import dataclasses

import pytest
from programs import NESTED

from dist_jax.plan import compiling, figures, hlo
from dist_jax.plan.chips import CHIPS
from dist_jax.plan.topology import parse_topology

V4 = CHIPS['v4']


@pytest.mark.parametrize(
    ('op_name', 'expected'),
    [
        (
            'jit(step)/image_tower/while/body/closed_call/attention/nlw,wchd->cnlhd/dot_general',
            ('image_tower/attention', ''),
        ),
        (
            'jit(step)/jvp(DistNet)/while/body/closed_call/layers/temporal_net/c_fc1/add',
            ('layers/temporal_net', 'forward'),
        ),
        (
            'jit(step)/transpose(jvp(DistNet))/while/body/closed_call/checkpoint/'
            'rematted_computation/layers/integration_net/ffn/c_fc/mul',
            ('layers/integration_net', 'recompute'),
        ),
        (
            'jit(step)/transpose(jvp(DistNet))/while/body/checkpoint/layers/ln/mul',
            ('layers/ln', 'backward'),
        ),
        (
            'jit(step)/transpose(jvp(DistNet))/adapooling_3/adapooling_3._feed_forward/ln/mul',
            ('adapooling_*/ln', 'backward'),
        ),
        ('jit(step)/jvp(Whole)/net/layers/ffn/mul', ('layers/ffn', 'forward')),
        ('jit(step)/jit(clip)/mul', ('(mixup.py)', '')),
    ],
)
def test_operations_belong_to_modules(op_name, expected):
    assert figures.group_of(op_name, '/x/dist_jax/mixup.py:3') == expected


def test_operations_without_a_name_are_named_by_their_kind():
    assert figures.group_of('', '', 'copy') == ('(copy)', '')
    assert figures.short_source('/a/site-packages/optax/_src/x.py:3') == 'optax/_src/x.py:3'


@pytest.mark.parametrize(
    ('argument', 'kind'),
    [
        ("state.params['layers']['kernel']", 'trainable'),
        ("state.opt_state[0].mu['a']", 'optimizer'),
        ("state.ema['a']", 'average'),
        ('state.step', 'other_state'),
        ("frozen['visual']['a']", 'frozen'),
        ("batch['video']", 'batch'),
        ("variables['params']['a']", 'trainable'),
        ('x', 'other'),
    ],
)
def test_arguments_are_of_a_kind(argument, kind):
    assert figures.kind_of(argument) == kind


def test_kernels_take_the_slower_of_products_and_traffic():
    op = hlo.Operation('k', 'custom-call', '', declared={'flops': 550, 'bytes_accessed': 1})
    assert figures.cycles_of(op, V4) == pytest.approx(550 / V4.peak_flops * V4.clock)
    op = dataclasses.replace(op, declared={'flops': 1, 'bytes_accessed': 10**6})
    assert figures.cycles_of(op, V4) == pytest.approx(1e6 / V4.hbm_bytes_per_second * V4.clock)


def test_only_collectives_that_are_waited_for_take_time():
    op = hlo.Operation(
        'r', 'all-reduce', '', collective='all-reduce', payload_bytes=3 * 10**8, group=(0, 1, 2, 3)
    )
    assert figures.cycles_of(op, V4) / V4.clock == pytest.approx(1.5e-3)
    gather = dataclasses.replace(op, collective='all-gather')
    assert figures.cycles_of(gather, V4) / V4.clock == pytest.approx(0.75e-3)
    beside = dataclasses.replace(op, asynchronous=True, count=2)
    program = hlo.Program((op, beside), (), ())
    found = figures.cycles(program, V4)
    assert found['estimated_cycles'] == pytest.approx(1.5e-3 * V4.clock)
    assert found['asynchronous_collective_seconds'] == pytest.approx(3e-3)
    assert figures.collective_bytes(program) == {'all-reduce': 9 * 10**8}


def gather(name, micros, **fields):
    payload = round(micros * 1e-6 * V4.ici_bytes_per_second * 4 / 3)
    fields = {'count': 5, 'group': (0, 2, 4, 6), 'asynchronous': True} | fields
    return hlo.Operation(
        name, 'all-gather', '', collective='all-gather', payload_bytes=payload, **fields
    )


def test_the_core_waits_for_what_is_not_hidden():
    """Two transfers of 4 us one after the other in a loop of 5 turns, 3 us of products beside."""
    done = [hlo.Operation(f'{c}-done', 'x', '', count=5, completes=c) for c in 'ab']
    work = hlo.Operation('w', 'fusion', '', count=5, cycles=round(3e-6 * V4.clock))
    program = hlo.Program((gather('a', 4), gather('b', 4), work, *done), (), ())
    micro = 1e-6 * V4.clock * 5
    first, second = figures.waits(program, V4)
    assert first.between == pytest.approx(3 * micro) == second.between - first.cycles
    assert first.cycles == pytest.approx(1 * micro)
    assert second.cycles == pytest.approx(4 * micro)
    found = figures.cycles(program, V4)
    assert found['collective_cycles'] == pytest.approx(5 * micro)
    assert found['estimated_cycles'] == pytest.approx(8 * micro)
    # With a third of the links 12 us each.
    narrow = found['collective_cycles_on_links_of_one_dimension']
    assert narrow == pytest.approx((24 - 3) * micro)
    (row,) = figures.collectives(program, V4, {'data': 4, 'fsdp': 2})
    assert (row['axes'], row['count'], row['chips']) == ('data', 10, 4)
    assert row['wait_cycles'] == pytest.approx(5 * micro)
    assert sum(time for _, time in figures.spent(program, V4)) == pytest.approx(8 * micro)


def test_kernels_show_their_schedule_and_their_memory():
    declared = {'flops': round(275e12 * 1e-6), 'bytes_accessed': round(1.228e12 * 2e-6)}
    ops = (
        hlo.Operation('mlp.3', 'custom-call', 'jit(f)/tower/x', count=3, declared=declared),
        hlo.Operation('mlp.4', 'custom-call', 'jit(f)/tower/x', declared=declared | {'flops': 0}),
    )
    (row,) = figures.kernel_times(hlo.Program(ops, (), ()), V4)
    assert (row['name'], row['module'], row['count']) == ('mlp', 'tower', 4)
    micro = 1e-6 * V4.clock
    assert row['schedule_cycles'] == pytest.approx(3 * micro, rel=1e-3)
    assert row['memory_cycles'] == row['cycles'] == pytest.approx(8 * micro, rel=1e-3)


GIB = 2**30
SHORT = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
    'required for HLO temporaries (36.10G) exceeds available HBM (30.75G). HLO module: jit_step.\n'
)
LONG = """\
RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory \
in memory space hbm. Used 30.76G of 30.75G hbm. Exceeded hbm capacity by 3.18M.

  Largest program allocations in hbm:

  1. Size: 28.03G
     Operator: op_name="jit(step)/slice"
     Shape: f32[8500,8,48,48,3]{1,0,3,4,2:T(8,128)}
     Unpadded size: 1.75G
     ==========================

  2. Size: 59.28M
     XLA label: overlays
     Allocation type: overlays
"""


def test_too_large_a_program_is_a_result():
    for message in (SHORT, SHORT.replace('E1000: CompileTimeHbmOom: ', '')):
        found = compiling.out_of_memory(message)
        assert not found.fits
        assert found.needed_bytes == pytest.approx(36.10 * GIB)
        assert found.limit_bytes == pytest.approx(30.75 * GIB)
    found = compiling.out_of_memory(LONG)
    assert found.needed_bytes == pytest.approx(30.76 * GIB)
    assert found.largest == (
        (28.03 * GIB, 'jit(step)/slice', 'f32[8500,8,48,48,3]{1,0,3,4,2:T(8,128)}'),
    )


def test_a_message_of_another_form_still_says_that_it_does_not_fit():
    found = compiling.out_of_memory('RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: too large')
    assert not found.fits and found.needed_bytes is None


def test_other_errors_are_errors():
    assert compiling.out_of_memory('RESOURCE_EXHAUSTED: vmem') is None
    assert compiling.out_of_memory('INTERNAL: Mosaic failed') is None


def test_a_program_that_fits_alone_may_not_fit_beside_the_batches_ahead():
    text = NESTED.replace("state.params[\\'a\\']", "batch[\\'video\\']")
    ((name, batch),) = hlo.read_program(text).parameters
    assert figures.kind_of(name) == 'batch'
    limit = 2**30
    memory = {'arguments': batch, 'outputs': 0, 'aliased': 0, 'program': 0}
    memory['temporaries'] = limit - 2 * batch  # one batch more would be too much
    compiled = compiling.Compiled(text, memory, limit_bytes=limit)
    for batches, fits in ((1, True), (2, True), (3, False)):
        one = compiling.Step(None, {}, 8, batches=batches)
        found = figures.step_figures(one, compiled, parse_topology('v4:2x2x1'))
        assert found['fits'] is fits
        assert found['hbm_bytes_needed'] == limit + (batches - 2) * batch
        assert found['hbm_bytes_per_chip']['batches_ahead'] == (batches - 1) * batch
