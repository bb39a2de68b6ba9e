"""What kernels declare is what the compiler makes of them."""

import pytest

from dist_jax.models import kernel_costs
from tools import generated, kernel_schedule
from tools.scheduling import bundles, cases
from tools.scheduling import compile as compiling

# Two cores; a loop of 3 turns in one of 5 + core, a part of it guarded, a copy in every other turn.
CODE = """
LB: loop body
     0   :  { %s1_s1 = sld [smem:[#allocation0]] /* core id */  ;;  %s2_s2 = smov 0 }
   0x1   :  { %s3_s3 = sadd.s32 5, %s1_s1 } /* Start region 1 */
   0x2 LB: > { %s4_s2 = sphi %s2_s2, %s9_s2 /* copy */  ;;  %s5_s5 = sand.u32 1, %s4_s2 }
   0x3   : > { %p6_p1 = scmp.eq.s32.totalorder %s5_s5, 0  ;;  %s7_s7 = smov 0 }
   0x4   : > { %8 = dma.hbm_to_vmem [thread:$0]  (%p6_p1), /*hbm=*/%s88_s8, \
/*size_in_granules=*/4, /*vmem=*/%s88_s8 /*
base_bounds: (8, 25)
 */ }
   0x5   : > { %10 = sbr.rel (!%p6_p1) target bundleno = 11 (0xb), region = 3  ;;  \
%v1_v1 = vadd.f32 %v0_v0, %v0_v0 }
   0x6   :  {}
   0x7 LB: >> { %s11_s7 = sphi %s7_s7, %s12_s7  ;;  %v2_v1 = vadd.f32 %v0_v0, %v1_v1 }
   0x8   : >> { %s12_s7 = sadd.s32 1, %s11_s7 }
   0x9   : >> { %p13_p2 = scmp.lt.s32.totalorder %s12_s7, 3  ;;  %70 = sst [smem:[#spill]] %s3_s3 }
   0xa   : >> { %14 = sbr.rel (%p13_p2) target bundleno = 7 (0x7), region = 2 }
   0xb PF: > { %s9_s2 = sadd.s32 1, %s4_s2  ;;  %s71_s9 = sld [smem:[#spill]] }
   0xc   : > { %p15_p3 = scmp.lt.s32.totalorder %s9_s2, %s71_s9 }
   0xd   : > { %16 = sbr.rel (%p15_p3) target bundleno = 2 (0x2), region = 1 }
   0xe   :  {}
   0xf   :  {}
"""
SLOTS = (
    """== CAPACTIY:
MXU, XLU, VALU
    4     2     2
== UTILIZATION:
"""
    + '0 0 0\n' * 7
    + '4 0 2\n'
    + '0 0 0\n' * 8
)


def test_loops_branches_and_copies_count_as_often_as_they_happen():
    code = bundles.parse(CODE)
    times, copied = bundles.run(code, core=0)
    # Five turns, in three of which the inner loop runs; the bundle behind a branch always does.
    assert times == [1, 1, 5, 5, 5, 5, 5, 9, 9, 9, 9, 11, 5, 5, 5, 1]
    assert copied == 3 * 4 * bundles.GRANULE_BYTES
    found = bundles.schedule(CODE, SLOTS)
    slower = sum(bundles.run(code, core=1)[0])  # six turns
    assert found.cycles == slower > sum(times)
    assert found.product_cycles == 9 and found.busy['VALU'] == 9 / slower


def test_a_branch_on_data_is_an_error():
    with pytest.raises(ValueError, match='bundle 13 depends on data'):
        bundles.run(bundles.parse(CODE.replace('#spill]] %s3_s3', '#other]] %s3_s3')), 0)
    with pytest.raises(ValueError, match='branch of an unknown kind'):
        bundles.parse(CODE.replace('sbr.rel', 'sbr.ind'))


def test_the_table_has_every_kernel_and_shape():
    """And every kernel declares what stands there, bytes too; formulas are near."""
    for kernel, shape in kernel_schedule.choose([]):
        (row,) = kernel_schedule.declared([(kernel, shape)])
        assert row['bundles'] >= row['products']
        assert max(map(abs, kernel_schedule.deviations(row))) < kernel_schedule.TOLERANCE
    assert all(k['formula_error'] < 0.15 for k in kernel_costs.table()['kernels'].values())


def test_other_shapes_go_by_the_formula():
    def bundles(tokens, heads):
        shape = {'tokens': tokens, 'queries': tokens, 'heads': heads, 'head_dim': 64}
        return kernel_costs.bundles('frame_attention', **shape)

    assert bundles(200, 12) == pytest.approx(bundles(197, 12), rel=0.15)
    assert bundles(200, 8) == pytest.approx(bundles(200, 16) / 2)


def test_a_kernel_that_was_never_measured_counts_its_products(monkeypatch):
    monkeypatch.setitem(kernel_costs.WORK, 'new', lambda tokens: {'products': 3 * tokens})
    assert kernel_costs.bundles('new', tokens=5) == 15


def test_names_choose_kernels():
    assert kernel_schedule.choose(['frame_attention:tokens=197,heads=12']) == [
        ('frame_attention', {'tokens': 197, 'queries': 197, 'heads': 12, 'head_dim': 64})
    ]
    with pytest.raises(ValueError, match=r'--only=mlp:.*residual_mlp:tokens=50,'):
        kernel_schedule.choose(['mlp'])


@pytest.mark.slow
def test_compiled_schedules_are_those_declared():
    """One kernel of each kind of work; `python -m tools.kernel_schedule --check` compiles all."""
    names = ('frame_attention', 'cut_patches', 'temporal_net_gradient', 'integration', 'side_conv')
    wanted = [
        (
            name,
            min(cases.KERNELS[name].shapes, key=lambda shape: kernel_costs.bundles(name, **shape)),
        )
        for name in names
    ]
    for row in compiling.measure(wanted):
        expected = kernel_costs.table()['versions']
        if any(row['versions'][name] != expected[name] for name in expected):
            pytest.skip(f'the table is of {expected}')
        bundles_off, bytes_off = kernel_schedule.deviations(row)
        assert abs(bundles_off) < kernel_schedule.TOLERANCE, row
        assert abs(bytes_off) < kernel_schedule.TOLERANCE, row


def test_the_page_has_the_table(tmp_path):
    page = tmp_path / 'performance.md'
    start = generated.begin(kernel_schedule.TOOL, 'kernels')
    page.write_text(f'Before.\n\n{start}\n{generated.END}\n')
    kernel_schedule.write_page(page)
    lines = page.read_text().splitlines()
    rows = [line for line in lines if line.startswith('| `')]
    assert len(rows) == sum(len(kernel.shapes) for kernel in cases.KERNELS.values())
    assert kernel_schedule.PAGE.read_text().count('\n'.join(rows)) == 1  # as it is in the docs
