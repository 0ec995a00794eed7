//! What becomes of a unit's sums: biases, the activation, the residual, and the output.

use super::super::math;
use super::super::simd::{LANES, Simd};
use super::{Finish, PAIR, PANEL, Unit, Units};

impl Units<'_> {
    /// Adds biases, applies the finish and writes the unit's columns.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&self, simd: S, unit: &Unit, acc: &mut [f32]) {
        let (width, places) = (self.product.width(), self.places(unit));
        let biases = self.biases(simd, unit);
        for (row, acc) in self.rows.clone().zip(acc.chunks_exact_mut(PAIR * PANEL)) {
            if let Some(biases) = &biases {
                add(simd, acc, biases);
            }
            self.activate(simd, acc);
            if let Finish::Add(residual) = self.product.finish {
                self.add_residual(simd, residual, row * width, &places, acc);
            }
            self.write(simd, row * width, &places, acc);
        }
    }

    /// Adds the residual of a unit's columns in the row that begins at `row`.
    #[inline(always)]
    pub(super) fn add_residual<S: Simd>(
        &self,
        simd: S,
        residual: &[f32],
        row: usize,
        places: &[(usize, usize); PAIR],
        acc: &mut [f32],
    ) {
        for (&(at, count), acc) in places.iter().zip(acc.chunks_exact_mut(PANEL)) {
            add(simd, &mut acc[..count], &residual[row + at..][..count]);
        }
    }

    /// The biases of a unit's columns, if any of its projections has some.
    #[inline(always)]
    pub(super) fn biases<S: Simd>(&self, simd: S, unit: &Unit) -> Option<[f32; PAIR * PANEL]> {
        let mut biases = None;
        for (at, part) in unit.panels.iter().enumerate() {
            let Some(part) = part else { continue };
            let projection = &self.product.projections[part.projection];
            if let Some(bias) = &projection.bias {
                let of_unit = biases.get_or_insert([0f32; PAIR * PANEL]);
                let first = self.expert * projection.matrix.rows + part.first;
                bias.slice(first, part.rows).widen(simd, &mut of_unit[at * PANEL..][..part.rows]);
            }
        }
        biases
    }

    /// Applies the activation function to a row of a unit.
    #[inline(always)]
    pub(super) fn activate<S: Simd>(&self, simd: S, acc: &mut [f32]) {
        match self.product.finish {
            Finish::Concat | Finish::Add(_) => {}
            Finish::SwiGlu | Finish::GeGlu | Finish::ClampedSwiGlu { .. } => {
                let (gate, up) = acc.split_at_mut(PANEL);
                // SAFETY: two panels of 16.
                let (first, second) = unsafe { (simd.load(gate.as_ptr()), simd.load(up.as_ptr())) };
                let gated = match self.product.finish {
                    Finish::GeGlu => simd.mul(math::gelu_tanh(simd, first), second),
                    Finish::ClampedSwiGlu { alpha, limit } => math::clamped_swiglu(simd, first, second, alpha, limit),
                    _ => simd.mul(math::silu(simd, first), second),
                };
                // SAFETY: a panel of 16.
                unsafe { simd.store(gate.as_mut_ptr(), gated) };
            }
            Finish::Gelu | Finish::SquaredRelu => {
                for half in acc.chunks_exact_mut(PANEL) {
                    // SAFETY: a panel of 16.
                    let x = unsafe { simd.load(half.as_ptr()) };
                    let y = if matches!(self.product.finish, Finish::Gelu) {
                        math::gelu(simd, x)
                    } else {
                        // In this order what is not a number stays.
                        let positive = simd.max(simd.splat(0.0), x);
                        simd.mul(positive, positive)
                    };
                    // SAFETY: as above.
                    unsafe { simd.store(half.as_mut_ptr(), y) };
                }
            }
        }
    }

    /// Where the panels of a unit that are written begin in a row of the output, and how many numbers they have there.
    #[inline(always)]
    pub(super) fn places(&self, unit: &Unit) -> [(usize, usize); PAIR] {
        let projections = self.product.projections;
        let mut places = [(0, 0); PAIR];
        for (place, panel) in places.iter_mut().zip(unit.panels.iter().flatten()) {
            let before: usize = match self.product.finish {
                Finish::Concat => projections[..panel.projection].iter().map(|p| p.matrix.rows).sum(),
                _ => 0,
            };
            *place = (before + panel.first, panel.rows);
        }
        if self.product.finish.is_gated() {
            places[1].1 = 0;
        }
        places
    }

    /// Writes the panels of a unit into the row of the output that begins at `row`.
    #[inline(always)]
    pub(super) fn write<S: Simd>(&self, simd: S, row: usize, places: &[(usize, usize); PAIR], acc: &[f32]) {
        for (&(at, count), acc) in places.iter().zip(acc.chunks_exact(PANEL)) {
            // SAFETY: every column of every row belongs to one unit, and `run` waits for all of them; a panel has 16 numbers.
            unsafe {
                if count == PANEL {
                    self.out.write_lanes(simd, row + at, simd.load(acc.as_ptr()));
                } else {
                    self.out.write(row + at, &acc[..count]);
                }
            }
        }
    }
}

/// Adds `terms` to as many `sums`.
#[inline(always)]
fn add<S: Simd>(simd: S, sums: &mut [f32], terms: &[f32]) {
    assert_eq!(sums.len(), terms.len());
    let whole = sums.len() / LANES * LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: sixteen numbers from `at` on are inside both.
        unsafe {
            let sum = simd.add(simd.load(sums.as_ptr().add(at)), simd.load(terms.as_ptr().add(at)));
            simd.store(sums.as_mut_ptr().add(at), sum);
        }
        at += LANES;
    }
    for at in whole..sums.len() {
        sums[at] += terms[at];
    }
}
