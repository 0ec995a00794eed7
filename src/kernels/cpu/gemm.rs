//! Products with many rows: register tiles over panels that were laid out for them (Goto and van de Geijn 2008,
//! "Anatomy of High-Performance Matrix Multiplication"), in f32, or in pairs of bf16 where the processor multiplies those.
//!
//! Every output is one chain of fused multiplications and additions over the columns, first to last: its bits do not depend on
//! other rows. They are other bits than those of `dot.rs`, which adds in sixteen lanes.

use std::ops::Range;

use super::dot::load_tail;
use super::floats::{Bf16, Element, f32_to_bf16};
use super::simd::{LANES, Simd, WORDS, Work};

/// Vectors of a panel.
const VECTORS: usize = 2;

/// Columns of a panel: one strip of `[depth, WIDTH]` numbers, or two strips of `[depth, LANES]` numbers where tiles have one
/// vector of columns. So a tile reads whole runs of memory: every other line would use half of the first cache's sets.
pub const WIDTH: usize = VECTORS * LANES;

/// Depth that is computed at once: a strip of it and a tile's rows stay in the caches.
const DEPTH: usize = 256;

/// The same for tiles with two panels, and rows of such a tile: it loads fewer numbers, for all lanes one at a time, than tiles of
/// more rows with one panel.
const WIDE_DEPTH: usize = 128;
const WIDE_ROWS: usize = 6;

/// Columns of a strip.
#[inline(always)]
const fn strip<S: Simd>() -> usize {
    S::GEMM_VECTORS * LANES
}

/// Where the sixteen columns from `lane` on begin in a panel of `depth` rows. Their rows are [`row_step`] numbers apart.
#[inline(always)]
pub fn lanes_at<S: Simd>(lane: usize, depth: usize) -> usize {
    lane / strip::<S>() * strip::<S>() * depth + lane % strip::<S>()
}

/// Numbers from a row of a strip to the next one.
#[inline(always)]
pub fn row_step<S: Simd>() -> usize {
    strip::<S>()
}

/// Two neighbouring bf16 of a row, as [`Simd::dot_bf16`] multiplies them. They travel as the f32 of the same bits.
#[derive(Debug, Clone, Copy, Default)]
#[repr(transparent)]
pub struct Pair([u16; 2]);

impl Pair {
    /// The first is in the lower half.
    #[inline(always)]
    pub fn of(first: Bf16, second: Bf16) -> Self {
        Self([first.0, second.0])
    }
}

impl Element for Pair {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise: sixteen pairs are 64 bytes.
        simd.float_of_bits(unsafe { simd.load_i(p.cast()) })
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0[0]) | u32::from(self.0[1]) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Pair([x.to_bits() as u16, (x.to_bits() >> 16) as u16])
    }
}

/// An even number of bf16, two by two.
pub fn as_pairs(bits: &[u16]) -> &[Pair] {
    assert!(bits.len().is_multiple_of(2));
    // SAFETY: `Pair` is a transparent wrapper of two `u16`.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len() / 2) }
}

/// Numbers rounded to bf16, two by two, as pairs.
pub struct RoundPairs<'a> {
    pub x: &'a [f32],
    pub pairs: &'a mut [f32],
}

impl Work for RoundPairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, pairs } = self;
        assert_eq!(x.len(), 2 * pairs.len());
        let whole = pairs.len() / LANES * LANES;
        let mut at = 0;
        while at < whole {
            // SAFETY: thirty-two numbers, and room for sixteen pairs of them.
            unsafe {
                let (first, second) = (simd.load(x.as_ptr().add(2 * at)), simd.load(x.as_ptr().add(2 * at + LANES)));
                let rounded = simd.float_of_bits(simd.round_bf16(first, second));
                simd.store(pairs.as_mut_ptr().add(at), rounded);
            }
            at += LANES;
        }
        for at in whole..pairs.len() {
            pairs[at] = Pair([f32_to_bf16(x[2 * at]), f32_to_bf16(x[2 * at + 1])]).to_f32();
        }
    }
}

/// Lays out up to sixteen rows of a matrix as lanes of a panel: element `k` of row `i` goes to `panel[k * row_step + i]`.
/// Rows begin `stride` elements apart, and have `depth` of them.
pub struct PackLanes<'a, T> {
    pub rows: &'a [T],
    pub stride: usize,
    pub count: usize,
    pub depth: usize,
    pub panel: &'a mut [f32],
}

impl<T: Element> Work for PackLanes<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows, stride, count, depth, panel } = self;
        assert!(count <= LANES && (count == 0 || rows.len() >= (count - 1) * stride + depth));
        let step = row_step::<S>();
        assert!(depth == 0 || panel.len() >= (depth - 1) * step + LANES);
        let mut square = [[0f32; LANES]; LANES];
        let mut k = 0;
        while k < depth {
            let columns = LANES.min(depth - k);
            if size_of::<T>() == size_of::<f32>() && count == LANES && columns == LANES {
                // SAFETY: sixteen rows with sixteen elements of 32 bits from `k` on, as was asserted.
                unsafe { turn(simd, rows.as_ptr().add(k).cast(), stride, columns, &mut panel[k * step..]) };
            } else {
                for i in 0..count {
                    let row = &rows[i * stride + k..i * stride + k + columns];
                    let numbers = if columns == LANES {
                        // SAFETY: sixteen elements.
                        unsafe { T::load(simd, row.as_ptr()) }
                    } else {
                        load_tail(simd, row)
                    };
                    // SAFETY: sixteen numbers.
                    unsafe { simd.store(square[i].as_mut_ptr(), numbers) };
                }
                // SAFETY: sixteen rows of sixteen numbers.
                unsafe { turn(simd, square.as_ptr().cast(), LANES, columns, &mut panel[k * step..]) };
            }
            k += columns;
        }
    }
}

/// Columns of sixteen rows of f32, which begin `stride` numbers apart, as lanes of the rows of a panel.
///
/// # Safety
/// Sixteen readable numbers in each row.
#[inline(always)]
unsafe fn turn<S: Simd>(simd: S, rows: *const f32, stride: usize, columns: usize, panel: &mut [f32]) {
    let step = row_step::<S>();
    assert!(columns <= LANES && panel.len() >= (columns - 1) * step + LANES);
    let mut first = 0;
    while first < columns {
        // SAFETY: eight of the sixteen numbers of each row; the panel has room for the lanes of every column.
        unsafe {
            let words = simd.load_words(rows.add(first).cast(), stride * size_of::<f32>());
            for w in 0..WORDS {
                if first + w < columns {
                    simd.store(panel.as_mut_ptr().add((first + w) * step), simd.float_of_bits(words[w]));
                }
            }
        }
        first += WORDS;
    }
}

/// Rows of `a` times rows of panels, added to rows of [`WIDTH`] numbers for each panel.
pub struct TimesPanels<'a> {
    /// Whether `a` and the panels are pairs of bf16, two columns each.
    pub pairs: bool,
    /// Row `m` begins at `m * a_stride` and has `depth` numbers.
    pub a: &'a [f32],
    pub a_stride: usize,
    pub rows: usize,
    pub depth: usize,
    /// So many whole panels, one after another.
    pub panels: &'a [f32],
    pub count: usize,
    /// Their row that is multiplied with the first number of the rows of `a`.
    pub begin: usize,
    /// Row `m` begins at `m * acc_stride`.
    pub acc: &'a mut [f32],
    pub acc_stride: usize,
}

impl Work for TimesPanels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        if self.pairs { self.by::<S, true>(simd) } else { self.by::<S, false>(simd) }
    }
}

impl<'a> TimesPanels<'a> {
    #[inline(always)]
    fn by<S: Simd, const PAIRS: bool>(&mut self, simd: S) {
        let (rows, width) = (self.rows, self.count * WIDTH);
        assert!(rows == 0 || self.a.len() >= (rows - 1) * self.a_stride + self.depth);
        assert!(rows == 0 || self.acc.len() >= (rows - 1) * self.acc_stride + width);
        assert!(self.begin + self.depth <= self.height());
        let mut column = 0;
        while column < width {
            let wide = S::GEMM_WIDE && width - column >= 2 * WIDTH;
            let (depth, columns) = if wide { (WIDE_DEPTH, 2 * WIDTH) } else { (DEPTH, strip::<S>()) };
            let mut first = 0;
            while first < self.depth {
                let depths = first..(first + depth).min(self.depth);
                if wide {
                    let row = self.wide::<S, PAIRS>(simd, column, &depths);
                    self.narrow::<S, PAIRS>(simd, row, column, &depths);
                    self.narrow::<S, PAIRS>(simd, row, column + WIDTH, &depths);
                } else {
                    self.narrow::<S, PAIRS>(simd, 0, column, &depths);
                }
                first = depths.end;
            }
            column += columns;
        }
    }

    /// Rows of a panel.
    #[inline(always)]
    fn height(&self) -> usize {
        self.panels.len() / (self.count * WIDTH).max(1)
    }

    /// Some rows of the strip that begins at `column`.
    #[inline(always)]
    fn strip<S: Simd>(&self, column: usize, depths: &Range<usize>) -> &'a [f32] {
        let (height, columns) = (self.height(), strip::<S>());
        &self.panels[column * height + (self.begin + depths.start) * columns..][..depths.len() * columns]
    }

    /// As many rows as fill tiles with the two panels that begin at `column`; returns how many.
    #[inline(always)]
    fn wide<S: Simd, const PAIRS: bool>(&mut self, simd: S, column: usize, depths: &Range<usize>) -> usize {
        let mut row = 0;
        while self.rows - row >= WIDE_ROWS {
            let strips = [self.strip::<S>(column, depths), self.strip::<S>(column + WIDTH, depths)];
            row += simd.call(Tile::<WIDE_ROWS, 2, 2, PAIRS> {
                a: &self.a[row * self.a_stride + depths.start..],
                a_stride: self.a_stride,
                strips,
                acc: &mut self.acc[row * self.acc_stride + column..],
                acc_stride: self.acc_stride,
            });
        }
        row
    }

    /// The rows from `row` on with the strip that begins at `column`.
    #[inline(always)]
    fn narrow<S: Simd, const PAIRS: bool>(&mut self, simd: S, mut row: usize, column: usize, depths: &Range<usize>) {
        while row < self.rows {
            row += tile::<S, PAIRS>(
                simd,
                self.rows - row,
                &self.a[row * self.a_stride + depths.start..],
                self.a_stride,
                self.strip::<S>(column, depths),
                &mut self.acc[row * self.acc_stride + column..],
                self.acc_stride,
            );
        }
    }
}

/// As many of `rows` rows with a strip as make a register tile; returns how many.
#[inline(always)]
fn tile<S: Simd, const PAIRS: bool>(
    simd: S,
    rows: usize,
    a: &[f32],
    a_stride: usize,
    strip: &[f32],
    acc: &mut [f32],
    acc_stride: usize,
) -> usize {
    if S::GEMM_VECTORS == 1 {
        return match rows {
            6.. if S::GEMM_ROWS >= 6 => {
                simd.call(Tile::<6, 1, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride })
            }
            4.. if S::GEMM_ROWS >= 4 => {
                simd.call(Tile::<4, 1, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride })
            }
            2.. if S::GEMM_ROWS >= 2 => {
                simd.call(Tile::<2, 1, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride })
            }
            _ => simd.call(Tile::<1, 1, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride }),
        };
    }
    match rows {
        12.. if S::GEMM_ROWS >= 12 => {
            simd.call(Tile::<12, 2, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride })
        }
        8.. if S::GEMM_ROWS >= 8 => simd.call(Tile::<8, 2, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride }),
        4.. if S::GEMM_ROWS >= 4 => simd.call(Tile::<4, 2, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride }),
        2.. if S::GEMM_ROWS >= 2 => simd.call(Tile::<2, 2, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride }),
        _ => simd.call(Tile::<1, 2, 1, PAIRS> { a, a_stride, strips: [strip], acc, acc_stride }),
    }
}

/// `M` rows with `N` strips of `V` vectors, [`WIDTH`] columns apart; returns `M`.
struct Tile<'a, const M: usize, const V: usize, const N: usize, const PAIRS: bool> {
    a: &'a [f32],
    a_stride: usize,
    strips: [&'a [f32]; N],
    acc: &'a mut [f32],
    acc_stride: usize,
}

impl<const M: usize, const V: usize, const N: usize, const PAIRS: bool> Work for Tile<'_, M, V, N, PAIRS> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let Self { a, a_stride, strips, acc, acc_stride } = self;
        let columns = V * LANES;
        let depth = strips[0].len() / columns;
        assert!(strips.iter().all(|strip| strip.len() == depth * columns));
        assert!(a.len() >= (M - 1) * a_stride + depth);
        assert!(acc.len() >= (M - 1) * acc_stride + (N - 1) * WIDTH + columns);
        let mut sums = [[[simd.splat(0.0); V]; N]; M];
        // SAFETY: rows of `a`, of `acc` and of the strips are in bounds, as was asserted.
        unsafe {
            for m in 0..M {
                for n in 0..N {
                    for v in 0..V {
                        let at = m * acc_stride + n * WIDTH + v * LANES;
                        sums[m][n][v] = simd.load(acc.as_ptr().add(at));
                    }
                }
            }
            for k in 0..depth {
                let mut b = [[simd.splat(0.0); V]; N];
                for n in 0..N {
                    for v in 0..V {
                        b[n][v] = simd.load(strips[n].as_ptr().add(k * columns + v * LANES));
                    }
                }
                for m in 0..M {
                    let x = simd.splat(*a.as_ptr().add(m * a_stride + k));
                    for n in 0..N {
                        for v in 0..V {
                            sums[m][n][v] = if PAIRS {
                                simd.dot_bf16(sums[m][n][v], simd.bits(x), simd.bits(b[n][v]))
                            } else {
                                simd.fma(x, b[n][v], sums[m][n][v])
                            };
                        }
                    }
                }
            }
            for m in 0..M {
                for n in 0..N {
                    for v in 0..V {
                        let at = m * acc_stride + n * WIDTH + v * LANES;
                        simd.store(acc.as_mut_ptr().add(at), sums[m][n][v]);
                    }
                }
            }
        }
        M
    }
}
