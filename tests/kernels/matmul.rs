//! Products against f64, and what else is promised of them.

use proptest::prelude::*;

use crate::case::{Ending, How, Inputs, Model, Plan, Routing, formats, plans};
use crate::cpu::Isa;
use crate::cpu::floats::{Floats, FloatsMut};
use crate::cpu::matmul::{Finish, MatMul, Precision, Projection, laid_out_len, lay_out};
use crate::cpu::matrix::{Coding, Matrix, Packed, Scales, Storage};
use crate::guard::{EDGES, Edge};
use crate::numbers::{Numbers, TYPES, Type, bits, cases, rounded};
use crate::reference::{Format, Random, Weights, first_miss};
use crate::threads::workers;

/// Packed formats alone.
fn packed_formats() -> impl Strategy<Value = Format> {
    formats().prop_filter("packed", |format| format.is_packed())
}

/// With every instruction set and at both edges of buffers, the product is as the reference says and does not depend
/// on where buffers lie; 16-bit outputs are the f32 ones, rounded.
fn check(plan: &Plan, precision: Precision) -> Result<(), TestCaseError> {
    let (model, inputs) = plan.build(Weights::random);
    let as_given = model.reference(&inputs, precision);
    let in_pairs = model.reference_in_pairs(&inputs, precision);
    let placed = EDGES.map(|edge| model.place(edge));
    for isa in Isa::available() {
        let expected = in_pairs.as_ref().filter(|_| isa.has_dot_bf16()).unwrap_or(&as_given);
        let how = How { isa, precision, threads: plan.threads };
        let [end, begin] = [0, 1].map(|edge| placed[edge].run_f32(&inputs, how));
        if let Err(miss) = first_miss(&end, expected, model.width()) {
            return Err(TestCaseError::fail(format!("{isa:?}: {miss}")));
        }
        prop_assert_eq!(bits(&end), bits(&begin), "{:?}: depends on where buffers lie", isa);
        let kind = TYPES[1 + plan.seed as usize % 2];
        let found = placed[plan.seed as usize / 2 % 2].run(&inputs, how, kind);
        prop_assert_eq!(found, rounded(kind, &end), "{:?}: rounding", isa);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn exact_products_are_within_the_bound(plan in plans(formats())) {
        check(&plan, Precision::Exact)?;
    }

    /// Fast products are those of activations rounded to 8 bits a group, within the bound of exact ones.
    #[test]
    fn fast_products_are_those_of_rounded_activations(plan in plans(formats())) {
        check(&plan, Precision::Fast)?;
    }

    /// A row's bits depend neither on the number of rows, nor on its place among them, nor on how rows are cut, nor on
    /// the number of threads.
    #[test]
    fn exact_rows_do_not_depend_on_others(plan in plans(formats()), cut in any::<u64>()) {
        let (model, inputs) = plan.build(Weights::random);
        let (placed, width) = (model.place(Edge::End), model.width());
        let mut random = Random(cut);
        for isa in Isa::available() {
            let how = |threads| How { isa, precision: Precision::Exact, threads };
            let whole = placed.run_f32(&inputs, how(plan.threads));
            let order = random.permutation(plan.m);
            let mut rest = &order[..];
            while !rest.is_empty() {
                let (rows, others) = rest.split_at(1 + random.below(rest.len().min(20)));
                rest = others;
                let some = placed.run_f32(&inputs.select(&model, rows), how(1 + random.below(3)));
                for (&row, some) in rows.iter().zip(some.chunks_exact(width)) {
                    prop_assert_eq!(bits(&whole[row * width..(row + 1) * width]), bits(some), "{:?}: row {}", isa, row);
                }
            }
        }
    }

    /// Of few rows dense weights know one precision. Many rows have bits of their own, which do not depend on other rows either.
    #[test]
    fn dense_rows_do_not_depend_on_others_in_fast_mode(
        plan in plans(prop::sample::select(&TYPES[..]).prop_map(Format::Dense)),
        more in 0usize..40,
    ) {
        let plan = Plan { m: if more % 2 == 0 { plan.m.min(63) } else { 64 + more }, ..plan };
        let (model, inputs) = plan.build(Weights::random);
        let placed = model.place(Edge::End);
        for isa in Isa::available() {
            let run = |inputs: &Inputs, precision, threads| placed.run_f32(inputs, How { isa, precision, threads });
            let fast = run(&inputs, Precision::Fast, plan.threads);
            if plan.m < 64 || plan.routing != Routing::None {
                prop_assert_eq!(bits(&fast), bits(&run(&inputs, Precision::Exact, plan.threads)), "{:?}", isa);
            } else {
                let some: Vec<usize> = (0..plan.m).rev().take(64).collect();
                let apart = run(&inputs.select(&model, &some), Precision::Fast, 1);
                for (&row, apart) in some.iter().zip(apart.chunks_exact(model.width())) {
                    prop_assert_eq!(bits(&fast[row * model.width()..(row + 1) * model.width()]), bits(apart), "{:?}", isa);
                }
            }
        }
    }

    /// What many rows of dense weights give, within the bound of exact products.
    #[test]
    fn many_rows_are_within_the_bound(
        plan in plans(prop::sample::select(&TYPES[..]).prop_map(Format::Dense)),
        more in 0usize..70,
    ) {
        check(&Plan { m: 64 + more, routing: Routing::None, stacked: 1, ..plan }, Precision::Fast)?;
    }

    /// Weights in bf16 with many rows: activations may be rounded to bf16, and are wherever the processor multiplies that.
    #[test]
    fn many_rows_of_bf16_are_within_a_hundredth((m, rows, columns) in (64usize..80, 1usize..70, 100usize..300), seed in any::<u64>()) {
        let parts = vec![(Format::Dense(Type::Bf16), rows, None)];
        let (ending, routing) = (Ending::Concat, Routing::None);
        let plan = Plan { seed, m, columns, parts, ending, stacked: 1, routing, threads: 2 };
        let (model, inputs) = plan.build(Weights::normal);
        let expected = model.reference(&inputs, Precision::Exact);
        let norm = expected.iter().map(|e| e.value.powi(2)).sum::<f64>().sqrt();
        for isa in Isa::available() {
            let found = model.place(Edge::End).run_f32(&inputs, How { isa, precision: Precision::Fast, threads: 2 });
            let squares = found.iter().zip(&expected).map(|(&found, e)| (f64::from(found) - e.value).powi(2));
            let error = squares.sum::<f64>().sqrt() / norm;
            prop_assert!(error <= 1e-2, "{isa:?}: off by {error} of the norm");
            let rounded = isa.has_dot_bf16() && columns % 2 == 0;
            prop_assert_eq!(rounded, first_miss(&found, &expected, model.width()).is_err(), "{:?}", isa);
        }
    }

    /// Of normal activations and weights with a mean of zero. Rounding to 8 bits moves an activation by at most a
    /// 254th of its group's largest one, a third of a percent of the row's norm in the mean over the group.
    #[test]
    fn fast_products_are_within_a_hundredth(
        format in packed_formats(),
        (m, rows, groups) in (1usize..=5, 129usize..=150, 4usize..=5),
        seed in any::<u64>(),
    ) {
        let columns = groups * 128;
        let parts = vec![(format, rows, None)];
        let (ending, routing) = (Ending::Concat, Routing::None);
        let plan = Plan { seed, m, columns, parts, ending, stacked: 1, routing, threads: 2 };
        let (model, inputs) = plan.build(Weights::normal);
        let expected = model.reference(&inputs, Precision::Exact);
        let placed = model.place(Edge::End);
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let found = placed.run_f32(&inputs, How { isa, precision: Precision::Fast, threads: 2 });
            let other = first.get_or_insert_with(|| found.clone());
            for (row, expected) in expected.chunks_exact(rows).enumerate() {
                let of_row = row * rows..(row + 1) * rows;
                let norm = expected.iter().map(|e| e.value.powi(2)).sum::<f64>().sqrt();
                let far = |a: &[f32], b: &mut dyn Iterator<Item = f64>| {
                    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt() / norm
                };
                let error = far(&found[of_row.clone()], &mut expected.iter().map(|e| e.value));
                prop_assert!(error <= 1e-2, "{isa:?} row {row}: off by {error} of the norm");
                let apart = far(&found[of_row.clone()], &mut other[of_row.clone()].iter().map(|&x| f64::from(x)));
                prop_assert!(apart <= 1e-6, "{isa:?} row {row}: {apart} of the norm from the portable set");
            }
        }
    }

    /// What is not a finite number is seen in all outputs of its row, and in no other row.
    #[test]
    fn infinities_reach_the_outputs(plan in plans(formats()), count in 1usize..6, seed in any::<u64>()) {
        let (model, inputs) = plan.build(Weights::random);
        let (columns, width) = (model.columns(), model.width());
        let mut random = Random(seed);
        let mut poisoned = inputs.clone();
        // These make numbers of infinities.
        let bounded = matches!(plan.ending, Ending::SquaredRelu | Ending::ClampedSwiGlu);
        let mut ill = vec![false; plan.m];
        for _ in 0..count.min(plan.m * columns) {
            // Several in a group too.
            let at = random.below(plan.m * columns);
            for at in [at, (at + 1).min(plan.m * columns - 1)] {
                let poison = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
                poisoned.x[at] = poison[random.below(if bounded { 2 } else { 4 })];
                ill[at / columns] = true;
            }
        }
        let placed = model.place(Edge::End);
        for (isa, precision) in each() {
            let how = How { isa, precision, threads: plan.threads };
            let (well, found) = (placed.run_f32(&inputs, how), placed.run_f32(&poisoned, how));
            for (row, &ill) in ill.iter().enumerate() {
                let (well, found) = (&well[row * width..(row + 1) * width], &found[row * width..(row + 1) * width]);
                if ill {
                    let lost = found.iter().position(|x| x.is_finite());
                    prop_assert_eq!(lost, None, "{:?} {:?} row {}: {:?}", isa, precision, row, found);
                } else {
                    prop_assert_eq!(bits(well), bits(found), "{:?} {:?} row {}", isa, precision, row);
                }
            }
        }
    }

    /// Activations near the ends of f32's range, one size for each 32 columns: results stay finite and in proportion.
    #[test]
    fn sizes_of_activations_do_no_harm(plan in plans(formats()), seed in any::<u64>()) {
        let (model, mut inputs) = plan.build(Weights::random);
        let mut random = Random(seed);
        let sizes = [0.0, 1e-45, 1e-41, 3e-39, 1e-38, 1e-36, 1e-30, 1e-10, 1.0, 1e10, 1e15];
        let largest = 1 + random.below(sizes.len());
        for row in inputs.x.chunks_exact_mut(model.columns()) {
            for x in row.chunks_mut(32) {
                let size = sizes[random.below(largest)];
                x.iter_mut().for_each(|x| *x *= size);
            }
        }
        let placed = model.place(Edge::End);
        let exact = model.reference(&inputs, Precision::Exact);
        let fast = model.reference(&inputs, Precision::Fast);
        let in_pairs = model.reference_in_pairs(&inputs, Precision::Fast);
        for (isa, precision) in each() {
            let found = placed.run_f32(&inputs, How { isa, precision, threads: plan.threads });
            let fast = in_pairs.as_ref().filter(|_| isa.has_dot_bf16()).unwrap_or(&fast);
            let expected = if precision == Precision::Exact { &exact } else { fast };
            if let Err(miss) = first_miss(&found, expected, model.width()) {
                return Err(TestCaseError::fail(format!("{isa:?} {precision:?}: {miss}")));
            }
        }
    }

    /// Without activations only biases and residuals are left.
    #[test]
    fn zeros_give_zeros(plan in plans(formats())) {
        let (model, mut inputs) = plan.build(Weights::random);
        inputs.x.fill(0.0);
        let expected = model.reference(&inputs, Precision::Exact);
        let bare = plan.parts.iter().all(|(.., bias)| bias.is_none()) && plan.ending != Ending::Add;
        let placed = model.place(Edge::End);
        for (isa, precision) in each() {
            let found = placed.run_f32(&inputs, How { isa, precision, threads: plan.threads });
            prop_assert_eq!(first_miss(&found, &expected, model.width()), Ok(()), "{:?} {:?}", isa, precision);
            prop_assert!(!bare || found.iter().all(|&x| x == 0.0), "{isa:?} {precision:?}");
        }
    }
}

/// Instruction sets and precisions.
fn each() -> impl Iterator<Item = (Isa, Precision)> {
    Isa::available().into_iter().flat_map(|isa| [(isa, Precision::Exact), (isa, Precision::Fast)])
}

/// A product of one projection.
fn one(format: Format, m: usize, columns: usize) -> (Model, Inputs) {
    let (ending, routing) = (Ending::Concat, Routing::None);
    let parts = vec![(format, 40, None)];
    Plan { seed: 1, m, columns, parts, ending, stacked: 1, routing, threads: 1 }.build(Weights::random)
}

const EXACT: Precision = Precision::Exact;

/// The bounds notice what they are for: one wrong activation, rounding to bf16, rounding to 8 bits, a lost column.
#[test]
fn bounds_notice_small_errors() {
    for format in [Format::Dense(Type::Bf16), Format::Affine { bits: 4, group: 64, scales: Type::Bf16 }] {
        let (model, inputs) = one(format, 2, 256);
        let expected = model.reference(&inputs, EXACT);
        let placed = model.place(Edge::End);
        let is_admitted = |changed: &Inputs, precision| {
            let found = placed.run_f32(changed, How { isa: Isa::best(), precision, threads: 1 });
            first_miss(&found, &expected, model.width()).is_ok()
        };
        assert!(is_admitted(&inputs, EXACT), "{format:?}");
        let mut rounded_x = inputs.clone();
        rounded_x.x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        assert!(!is_admitted(&rounded_x, EXACT), "{format:?}: activations in bf16");
        let mut lost = inputs.clone();
        lost.x[255] = 0.0;
        assert!(!is_admitted(&lost, EXACT), "{format:?}: a lost column");
        assert_eq!(is_admitted(&inputs, Precision::Fast), !format.is_packed(), "{format:?}: 8 bits");
    }
}

/// The comparison of bits notices another order of the same sum, and precisions are not the same.
#[test]
fn bits_tell_orders_and_precisions_apart() {
    let (model, inputs) = one(Format::Dense(Type::F32), 1, 256);
    let columns: Vec<usize> = (0..256).rev().collect();
    let mut reversed = inputs.clone();
    reversed.x.reverse();
    let expected = model.reference(&inputs, EXACT);
    let other = model.reordered(&columns);
    let (packed, x) = one(Format::Affine { bits: 4, group: 64, scales: Type::Bf16 }, 1, 256);
    for isa in Isa::available() {
        let how = |precision| How { isa, precision, threads: 1 };
        let (there, back) = (model.place(Edge::End), other.place(Edge::End));
        let (there, back) = (there.run_f32(&inputs, how(EXACT)), back.run_f32(&reversed, how(EXACT)));
        assert_ne!(bits(&there), bits(&back), "{isa:?}: another order, the same bits");
        for found in [there, back] {
            assert_eq!(first_miss(&found, &expected, model.width()), Ok(()), "{isa:?}");
        }
        let packed = packed.place(Edge::End);
        let [exact, fast] = [EXACT, Precision::Fast].map(|precision| bits(&packed.run_f32(&x, how(precision))));
        let same = exact.iter().zip(&fast).filter(|(a, b)| a == b).count();
        assert!(same <= 2, "{isa:?}: {same} outputs are the same in both precisions");
    }
}

/// Integer sums are exact and are scaled in one order: fast products have the same bits however many rows are multiplied
/// at once, and on all instruction sets that round alike.
#[test]
fn fast_bits_do_not_depend_on_the_number_of_rows() {
    let widths = [2, 3, 4, 5, 6, 8].into_iter();
    let affine = widths.flat_map(|bits| {
        [16, 32, 64, 128].map(|group| Format::Affine { bits, group, scales: TYPES[(bits + group / 32) % 3] })
    });
    for format in affine.chain([Format::Mxfp4, Format::Nvfp4]) {
        let (model, inputs) = one(format, 17, 640);
        let (expected, placed) = (model.reference(&inputs, Precision::Fast), model.place(Edge::End));
        let mut fused = None;
        for isa in Isa::available() {
            let how = How { isa, precision: Precision::Fast, threads: 1 };
            let all = placed.run_f32(&inputs, how);
            assert_eq!(first_miss(&all, &expected, model.width()), Ok(()), "{isa:?}: {format:?}");
            let all = bits(&all);
            for m in 1..17 {
                let rows: Vec<usize> = (0..m).collect();
                let some = bits(&placed.run_f32(&inputs.select(&model, &rows), how));
                assert_eq!(some, all[..m * model.width()], "{isa:?}: {m} rows of {format:?}");
            }
            if isa != Isa::SCALAR {
                assert_eq!(fused.get_or_insert_with(|| all.clone()), &all, "{isa:?}: {format:?}");
            }
        }
    }
}

/// Of many rows of dense weights every output is one chain of fused additions over the columns, first to last, on all
/// instruction sets that fuse: neither register tiles nor the depth at which they stop show. The chain backwards has other bits.
#[test]
fn many_rows_are_chains_over_the_columns() {
    let mut random = Random(17);
    for (m, rows, columns) in [(64, 16, 7), (67, 41, 1100), (71, 70, 512)] {
        let (x, weights) = (random.normals(m * columns), random.normals(rows * columns));
        let matrix = Matrix { rows, columns, storage: Storage::Dense(Floats::F32(&weights)) };
        let product = MatMul {
            x: &x,
            projections: &[Projection { matrix, bias: None }],
            experts: None,
            stacked: 1,
            finish: Finish::Concat,
            precision: Precision::Fast,
        };
        let chain = |at: usize, backwards: bool| {
            let (x, w) = (&x[at / rows * columns..][..columns], &weights[at % rows * columns..][..columns]);
            let step = |sum: f32, k: usize| x[k].mul_add(w[k], sum);
            if backwards { (0..columns).rev().fold(0.0, step) } else { (0..columns).fold(0.0, step) }
        };
        let [forwards, backwards] =
            [false, true].map(|turn| (0..m * rows).map(|at| chain(at, turn)).collect::<Vec<_>>());
        for isa in Isa::available().into_iter().filter(|&isa| isa != Isa::SCALAR) {
            let mut found = vec![f32::NAN; m * rows];
            product.run(isa, &workers(2), FloatsMut::F32(&mut found));
            assert_eq!(bits(&found), bits(&forwards), "{isa:?}: {m} x {rows} x {columns}");
            assert_ne!(bits(&found), bits(&backwards), "{isa:?}: {m} x {rows} x {columns}");
        }
    }
}

/// Weights that were laid out before give what those do that are laid out for a product, bias, activation and residual included,
/// and the same rows have the same bits however few they are.
#[test]
fn weights_laid_out_once_give_the_same_products() {
    let mut random = Random(23);
    for (m, rows, columns) in [(64, 16, 7), (67, 41, 1100), (150, 70, 512), (64, 96, 33)] {
        let (x, residual) = (random.normals(m * columns), random.normals(m * rows));
        let weights = [(); 3].map(|()| random.normals(rows * columns));
        let bias = random.normals(rows);
        for isa in Isa::available() {
            let matrices =
                weights.each_ref().map(|w| Matrix { rows, columns, storage: Storage::Dense(Floats::F32(w)) });
            let laid_out = matrices.map(|matrix| {
                let mut panels = vec![f32::NAN; laid_out_len(rows, columns)];
                lay_out(isa, &workers(2), matrix, &mut panels);
                panels
            });
            let stored: Vec<Matrix<'_>> =
                laid_out.iter().map(|p| Matrix { rows, columns, storage: Storage::LaidOut(p) }).collect();
            for (count, finish) in
                [(3, Finish::Concat), (1, Finish::Add(&residual)), (1, Finish::Gelu), (1, Finish::SquaredRelu)]
            {
                let run = |matrices: &[Matrix<'_>], m: usize| {
                    let bias = Some(Floats::F32(&bias));
                    let projections: Vec<_> =
                        matrices[..count].iter().map(|&matrix| Projection { matrix, bias }).collect();
                    let (x, projections) = (&x[..m * columns], &projections[..]);
                    let finish = if let Finish::Add(_) = finish { Finish::Add(&residual[..m * rows]) } else { finish };
                    let (experts, stacked, precision) = (None, 1, Precision::Fast);
                    let product = MatMul { x, projections, experts, stacked, finish, precision };
                    let mut found = vec![f32::NAN; m * rows * count];
                    product.run(isa, &workers(2), FloatsMut::F32(&mut found));
                    bits(&found)
                };
                let all = run(&stored, m);
                assert_eq!(all, run(&matrices, m), "{isa:?}: {m} x {rows} x {columns}, {finish:?}");
                for few in [1, 2, 5, 63] {
                    assert_eq!(run(&stored, few), all[..few * rows * count], "{isa:?}: {few} of {m}, {finish:?}");
                }
            }
        }
    }
}

/// A product with an error of its caller's panics before it reads or writes anything.
#[test]
fn sizes_that_do_not_agree_are_refused() {
    let weights = vec![1f32; 6];
    let matrix = Matrix { rows: 2, columns: 3, storage: Storage::Dense(Floats::F32(&weights)) };
    let projection = Projection { matrix, bias: None };
    let (two, x, codes) = ([projection, projection], [1f32; 6], [0u8; 32]);
    let good = || MatMul {
        x: &x,
        projections: &two[..1],
        experts: None,
        stacked: 1,
        finish: Finish::Concat,
        precision: Precision::Exact,
    };
    let packed = |bits, group, columns| {
        let scales = Scales::Affine(Floats::F32(&x[..1]), Floats::F32(&x[..1]));
        let storage = Storage::Packed(Packed { codes: &codes, scales, coding: Coding::Affine(bits), group });
        [Projection { matrix: Matrix { rows: 1, columns, storage }, bias: None }]
    };
    let [seven, small, half, few] = [packed(7, 32, 32), packed(8, 8, 32), packed(4, 128, 64), packed(8, 64, 64)];
    let other = [Projection { matrix: Matrix { rows: 3, columns: 2, ..matrix }, bias: None }, projection];
    let laid_out = |numbers| Projection { matrix: Matrix { storage: Storage::LaidOut(numbers), ..matrix }, bias: None };
    let panels = [1f32; 96];
    let (short, mixed) = ([laid_out(&panels[..95])], [laid_out(&panels), projection]);
    let apart = [laid_out(&panels), laid_out(&panels)];
    let biased = [Projection { matrix, bias: Some(Floats::F32(&x[..1])) }];
    let long = [1f32; 64];
    let bad: Vec<(&str, MatMul<'_>, usize)> = vec![
        ("a short output", good(), 3),
        ("a long output", good(), 5),
        ("activations", MatMul { x: &x[..5], ..good() }, 2),
        ("different columns", MatMul { projections: &other, ..good() }, 15),
        ("weights", MatMul { stacked: 2, experts: Some(&[0, 0]), ..good() }, 4),
        ("experts of one matrix", MatMul { stacked: 0, ..good() }, 4),
        ("too few experts", MatMul { experts: Some(&[0]), ..good() }, 4),
        ("an unknown expert", MatMul { experts: Some(&[0, 1]), ..good() }, 4),
        ("a short bias", MatMul { projections: &biased, ..good() }, 4),
        ("short weights that are laid out", MatMul { projections: &short, ..good() }, 4),
        ("one of two laid out", MatMul { projections: &mixed, ..good() }, 8),
        ("two laid out apart", MatMul { projections: &apart, finish: Finish::SwiGlu, ..good() }, 4),
        ("a short residual", MatMul { finish: Finish::Add(&x[..3]), ..good() }, 4),
        ("two projections to add", MatMul { projections: &two, finish: Finish::Add(&long[..8]), ..good() }, 8),
        ("a gate alone", MatMul { finish: Finish::SwiGlu, ..good() }, 4),
        ("two projections to activate", MatMul { projections: &two, finish: Finish::Gelu, ..good() }, 8),
        ("7 bits", MatMul { x: &long[..32], projections: &seven, ..good() }, 1),
        ("groups of 8", MatMul { x: &long[..32], projections: &small, ..good() }, 1),
        ("half a group", MatMul { x: &long, projections: &half, ..good() }, 1),
        ("codes", MatMul { x: &long, projections: &few, ..good() }, 1),
    ];
    for isa in Isa::available() {
        let run = |product: &MatMul<'_>, len: usize| {
            let mut out = vec![7f32; len];
            let run = std::panic::AssertUnwindSafe(|| product.run(isa, &workers(1), FloatsMut::F32(&mut out)));
            (std::panic::catch_unwind(run).is_ok(), out)
        };
        assert_eq!(run(&good(), 4), (true, vec![3.0; 4]), "{isa:?}");
        let eight = MatMul { x: &long[..32], projections: &packed(8, 32, 32), ..good() };
        assert_eq!(run(&eight, 1), (true, vec![32.0]), "{isa:?}");
        for (what, product, len) in &bad {
            assert_eq!(run(product, *len), (false, vec![7.0; *len]), "{isa:?}: {what}");
        }
    }
}

/// All codes of all widths in every place of a row, with scales that tell which.
#[test]
fn every_code_is_read() {
    for bits in [2usize, 3, 4, 5, 6, 8] {
        let (format, columns) = (Format::Affine { bits, group: 64, scales: Type::F32 }, 64 << bits.saturating_sub(6));
        let (ending, routing, parts) = (Ending::Concat, Routing::None, vec![(format, 33, None)]);
        let plan = Plan { seed: 3, m: columns, columns, parts, ending, stacked: 1, routing, threads: 2 };
        let (model, mut inputs) = plan.build(Weights::random);
        // Each row of activations picks one column: the result is the weight itself, whatever the precision.
        inputs.x.iter_mut().enumerate().for_each(|(i, x)| *x = f32::from(u8::from(i / columns == i % columns)));
        let expected = model.reference(&inputs, EXACT);
        let placed = model.place(Edge::Begin);
        for (isa, precision) in each() {
            let found = placed.run_f32(&inputs, How { isa, precision, threads: 2 });
            for (found, expected) in found.iter().zip(&expected) {
                let error = (f64::from(*found) - expected.value).abs();
                assert!(error <= 1e-6, "{bits} bits, {isa:?} {precision:?}: {found} is not {}", expected.value);
            }
        }
    }
}

/// Outputs go nowhere if there are none.
#[test]
fn no_rows_give_no_outputs() {
    let (model, inputs) = one(Format::Mxfp4, 0, 64);
    for (isa, precision) in each() {
        let out = model.place(Edge::End).run(&inputs, How { isa, precision, threads: 3 }, Type::Bf16);
        assert_eq!(out, Numbers::Bf16(Vec::new()));
    }
}
