//! Packed weights times quantised activations, in integers.
//!
//! Lanes are weight rows. Codes of sixteen rows are transposed so that a vector holds four codes of each row; one
//! instruction then multiplies them with four activations. The integer sums of a group are scaled and added in f32:
//! `y = sum over groups of (scale_w * code + bias) * scale_x * byte`.

mod direct;
mod tile;

use std::cell::RefCell;
use std::ops::Range;

use tile::Tile;

use super::floats::Floats;
use super::matmul::{PAIR, PANEL};
use super::matrix::{Coding, FP4_TABLE, Packed, Scales};
use super::quantize::{Order, QuantizedRows};
use super::simd::{LANES, Simd, WORDS, Work};

/// Bytes of a vector.
const VECTOR: usize = 4 * LANES;

/// Bytes that [`Simd::load_words`] takes of a row.
const BLOCK: usize = 4 * WORDS;

/// Groups that one block of 16-bit scales holds.
const SPAN: usize = BLOCK / 2;

/// About as many codes of a row are unpacked before they are multiplied: two panels of them fit the first cache.
const CHUNK: usize = 512;

/// What is read next is fetched meanwhile, at an even rate: there are only so many requests on their way at once. Of two
/// panels, the first one's codes come while this pair is multiplied, of each block of the second one so many bytes while
/// sums are scaled, and the others while codes are unpacked.
const UNPACKING: usize = PANEL * BLOCK / 2;

/// A piece of memory on a cache line of its own.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; VECTOR]);

/// A unit's buffers, kept by each thread.
#[derive(Default)]
struct Scratch {
    /// Unpacked codes of a chunk, `[panel][four codes][lane]`.
    codes: Vec<Line>,
    /// `[panel][group][scale, bias][lane]`.
    scales: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { codes: Vec::new(), scales: Vec::new() }) };
}

/// Weight rows of a matrix, at most a panel of them.
#[derive(Clone, Copy)]
pub struct WeightRows<'a> {
    pub packed: &'a Packed<'a>,
    /// The first row, and how many.
    pub first: usize,
    pub rows: usize,
    /// Rows from here to those that are read next, for prefetching.
    pub next: usize,
}

/// One or two panels of the same format times some rows of activations.
pub struct Integer<'a> {
    pub panels: &'a [WeightRows<'a>],
    pub columns: usize,
    /// All quantised activations, and the rows of them to use.
    pub x: &'a QuantizedRows,
    pub x_rows: Range<usize>,
}

impl<'a> Integer<'a> {
    /// Writes the products into `acc`, a row every `PAIR * PANEL` numbers, a panel every `PANEL`.
    #[inline(always)]
    pub fn run<S: Simd>(&self, simd: S, acc: &mut [f32]) {
        match self.panels.len() {
            1 => self.all_panels::<S, 1>(simd, acc),
            _ => self.all_panels::<S, 2>(simd, acc),
        }
    }

    /// What the panels have in common: the format.
    fn packed(&self) -> &'a Packed<'a> {
        self.panels[0].packed
    }

    /// Columns whose activations share a scale: a group of codes, or a part of one.
    fn group(&self) -> usize {
        Order::of(self.packed()).group
    }

    fn groups(&self) -> usize {
        self.columns / self.group()
    }

    /// How many groups of activations meet a group of codes.
    fn repeats(&self) -> usize {
        self.packed().group / self.group()
    }

    #[inline(always)]
    fn all_panels<S: Simd, const N: usize>(&self, simd: S, acc: &mut [f32]) {
        assert_eq!(self.panels.len(), N);
        let group = self.group();
        let steps = group / 4;
        let chunk = (CHUNK / group).max(1);
        let m = self.x_rows.len();
        assert!(acc.len() >= (m.next_multiple_of(S::ROWS_TOGETHER).max(1) - 1) * PAIR * PANEL + N * PANEL);
        for row in 0..m {
            acc[row * PAIR * PANEL..][..N * PANEL].fill(0.0);
        }
        // Taken, not borrowed in a closure: a closure would be compiled without the instruction set.
        let mut scratch = SCRATCH.take();
        let zero = Line([0; VECTOR]);
        let lines = N * chunk * steps;
        if scratch.codes.len() < lines {
            scratch.codes.resize(lines, zero);
        }
        if scratch.scales.len() < N * self.groups() * 2 {
            scratch.scales.resize(N * self.groups() * 2, zero);
        }
        for panel in 0..N {
            let scales = &mut scratch.scales[panel * self.groups() * 2..][..self.groups() * 2];
            simd.call(LoadScales { of: self, panel, out: scales });
        }
        if self.is_direct(simd) {
            for panel in 0..N {
                let scales = &scratch.scales[panel * self.groups() * 2..][..self.groups() * 2];
                self.direct(simd, panel, scales, &mut acc[panel * PANEL..]);
            }
            SCRATCH.set(scratch);
            return;
        }
        for first in (0..self.groups()).step_by(chunk) {
            let groups = first..(first + chunk).min(self.groups());
            let len = groups.len() * steps;
            let last = (N > 1).then(|| self.next_codes(N - 1, groups.start * group));
            for panel in 0..N {
                let codes = &mut scratch.codes[panel * len..(panel + 1) * len];
                let next = last.map(|last| last.wrapping_add(UNPACKING + panel * (PANEL * BLOCK - UNPACKING) / N));
                simd.call(Unpack { of: self, panel, span: groups.start * group..groups.end * group, next, out: codes });
            }
            let mut next = [std::ptr::null(); N];
            for (panel, next) in next.iter_mut().enumerate() {
                *next = self.next_codes(panel, groups.start * group);
            }
            let tile = Tile { codes: &scratch.codes[..N * len], scales: &scratch.scales, groups, of: self, next };
            tile.all_rows(simd, acc);
        }
        SCRATCH.set(scratch);
    }

    /// The codes that take the place of those from column `first` on in the panel that is read next: all sixteen rows'
    /// share, as one run. They need not exist.
    fn next_codes(&self, panel: usize, first: usize) -> *const u8 {
        let row_bytes = self.columns * self.packed().coding.bits() / 8;
        let WeightRows { packed, first: row, next, .. } = self.panels[panel];
        let share = PANEL * first * packed.coding.bits() / 8;
        packed.codes.as_ptr().wrapping_add((row + next) * row_bytes + share)
    }

    /// Rows of panel `panel`.
    fn panel_rows(&self, panel: usize) -> Range<usize> {
        let WeightRows { first, rows, .. } = self.panels[panel];
        first..first + rows
    }

    /// Scales and biases of the panel's rows for each group of activations, `[group][scale, bias]`.
    #[inline(always)]
    fn load_scales<S: Simd>(&self, simd: S, panel: usize, out: &mut [Line]) {
        let (rows, repeats) = (self.panel_rows(panel), self.repeats());
        let groups = self.groups() / repeats;
        let whole = rows.len() == PANEL && groups >= SPAN;
        let packed = self.panels[panel].packed;
        match &packed.scales {
            Scales::Affine(Floats::Bf16(scales), Floats::Bf16(biases)) if whole => {
                self.load_halves::<S, true>(simd, [scales, biases], panel, out);
            }
            Scales::Affine(Floats::F16(scales), Floats::F16(biases)) if whole => {
                self.load_halves::<S, false>(simd, [scales, biases], panel, out);
            }
            _ => {
                for group in 0..groups {
                    let (mut scales, mut biases) = ([0f32; LANES], [0f32; LANES]);
                    for (lane, row) in rows.clone().enumerate() {
                        (scales[lane], biases[lane]) = packed.scale_and_bias(row * groups + group);
                    }
                    for lines in out[2 * group * repeats..2 * (group + 1) * repeats].chunks_exact_mut(2) {
                        // SAFETY: arrays of sixteen; a line has room for sixteen f32.
                        unsafe {
                            simd.store(lines[0].0.as_mut_ptr().cast(), simd.load(scales.as_ptr()));
                            simd.store(lines[1].0.as_mut_ptr().cast(), simd.load(biases.as_ptr()));
                        }
                    }
                }
            }
        }
    }

    /// The same for a whole panel of 16-bit numbers, of at least 16 groups.
    #[inline(always)]
    fn load_halves<S: Simd, const BF16: bool>(&self, simd: S, numbers: [&[u16]; 2], panel: usize, out: &mut [Line]) {
        let WeightRows { first, next, .. } = self.panels[panel];
        let (low, high) = (simd.splat_i(0xffff), simd.splat_i(0xffff_0000u32 as i32));
        let repeats = self.repeats();
        let groups = self.groups() / repeats;
        for (which, numbers) in numbers.into_iter().enumerate() {
            let ahead = numbers.as_ptr().wrapping_add((first + next) * groups).cast::<u8>();
            let mut line = 0;
            while line < 2 * PANEL * groups {
                simd.prefetch(ahead.wrapping_add(line));
                line += 64;
            }
            let panel = &numbers[first * groups..(first + PANEL) * groups];
            for start in (0..groups).step_by(SPAN) {
                // The last block may overlap the one before.
                let start = start.min(groups - SPAN);
                // SAFETY: `start + SPAN <= groups`, so each of the 16 rows has a block of 32 bytes there.
                let words = unsafe { simd.load_words(panel[start..].as_ptr().cast(), 2 * groups) };
                for (word, &halves) in words.iter().enumerate() {
                    let numbers = if BF16 {
                        [simd.float_of_bits(simd.shl::<16>(halves)), simd.float_of_bits(simd.and(halves, high))]
                    } else {
                        [simd.float_of_f16(simd.and(halves, low)), simd.float_of_f16(simd.shr::<16>(halves))]
                    };
                    for (half, numbers) in numbers.into_iter().enumerate() {
                        let group = start + 2 * word + half;
                        for line in
                            out[2 * group * repeats..2 * (group + 1) * repeats].iter_mut().skip(which).step_by(2)
                        {
                            // SAFETY: a line has room for sixteen f32.
                            unsafe { simd.store(line.0.as_mut_ptr().cast(), numbers) };
                        }
                    }
                }
            }
        }
    }

    /// Codes `span` of the panel's rows as bytes, four of each row in a vector.
    #[inline(always)]
    fn unpack<S: Simd>(&self, simd: S, panel: usize, span: Range<usize>, next: Option<*const u8>, out: &mut [Line]) {
        match (Order::of(self.packed()).bits, self.packed().coding) {
            (4, Coding::Affine(_)) => self.unpack_words::<S, 4, false>(simd, panel, span, next, out),
            (4, Coding::Fp4) => self.unpack_words::<S, 4, true>(simd, panel, span, next, out),
            (2, _) => self.unpack_words::<S, 2, false>(simd, panel, span, next, out),
            (_, Coding::Affine(8)) => self.unpack_words::<S, 8, false>(simd, panel, span, next, out),
            _ => self.unpack_any(simd, panel, span, out),
        }
    }

    #[inline(always)]
    fn unpack_words<S: Simd, const BITS: usize, const FP4: bool>(
        &self,
        simd: S,
        panel: usize,
        span: Range<usize>,
        next: Option<*const u8>,
        out: &mut [Line],
    ) {
        let rows = self.panel_rows(panel);
        let row_bytes = self.columns * BITS / 8;
        let (start, end) = (span.start * BITS / 8, span.end * BITS / 8);
        let codes = &self.panels[panel].packed.codes[rows.start * row_bytes..rows.end * row_bytes];
        let per_block = WORDS * 8 / BITS;
        let mut at = start;
        while at < end {
            if let Some(next) = next {
                let next = next.wrapping_add(PANEL * (at - start));
                simd.prefetch(next);
                simd.prefetch(next.wrapping_add(64));
            }
            let block = (at - start) / BLOCK * per_block;
            let lines = per_block.min(out.len() - block);
            let words = load_block(simd, codes, row_bytes, at..end);
            spread::<S, BITS, FP4>(simd, &words, &mut out[block..block + lines]);
            at += BLOCK;
        }
    }

    /// For codes that straddle bytes: unpacked to bytes one by one.
    #[inline(always)]
    fn unpack_any<S: Simd>(&self, simd: S, panel: usize, span: Range<usize>, out: &mut [Line]) {
        let rows = self.panel_rows(panel);
        let packed = self.panels[panel].packed;
        let row_bytes = self.columns * packed.coding.bits() / 8;
        let codes = &packed.codes[rows.start * row_bytes..rows.end * row_bytes];
        for (block, out) in out.chunks_mut(WORDS).enumerate() {
            let first = span.start + block * BLOCK;
            let len = BLOCK.min(span.end - first);
            let mut bytes = [0u8; PANEL * BLOCK];
            for (row, bytes) in codes.chunks_exact(row_bytes).zip(bytes.chunks_exact_mut(BLOCK)) {
                packed.codes(row, first, &mut bytes[..len]);
            }
            // SAFETY: sixteen blocks.
            let words = unsafe { simd.load_words(bytes.as_ptr(), BLOCK) };
            spread::<S, 8, false>(simd, &words, out);
        }
    }
}

/// The block of sixteen rows of `row_bytes` that begins at `span`, whose end is that of the codes wanted.
#[inline(always)]
fn load_block<S: Simd>(simd: S, codes: &[u8], row_bytes: usize, span: Range<usize>) -> [S::I; WORDS] {
    if codes.len() == PANEL * row_bytes && span.start + BLOCK <= span.end {
        // SAFETY: `codes` has 16 rows, and each has a block of 32 bytes at `span.start`: `span.end` is in the row.
        return unsafe { simd.load_words(codes[span.start..].as_ptr(), row_bytes) };
    }
    let mut copy = [0u8; PANEL * BLOCK];
    let len = BLOCK.min(span.end - span.start);
    for (row, copy) in codes.chunks_exact(row_bytes).zip(copy.chunks_exact_mut(BLOCK)) {
        copy[..len].copy_from_slice(&row[span.start..span.start + len]);
    }
    // SAFETY: sixteen blocks.
    unsafe { simd.load_words(copy.as_ptr(), BLOCK) }
}

/// See [`Integer::load_scales`].
struct LoadScales<'a> {
    of: &'a Integer<'a>,
    panel: usize,
    out: &'a mut [Line],
}

impl Work for LoadScales<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.of.load_scales(simd, self.panel, self.out);
    }
}

/// See [`Integer::unpack`].
struct Unpack<'a> {
    of: &'a Integer<'a>,
    panel: usize,
    span: Range<usize>,
    /// What to fetch meanwhile: a part of what takes the last panel's place.
    next: Option<*const u8>,
    out: &'a mut [Line],
}

impl Work for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.of.unpack(simd, self.panel, self.span, self.next, self.out);
    }
}

/// Codes of `BITS` in eight words to one byte each, a vector for every four of a lane.
#[inline(always)]
fn spread<S: Simd, const BITS: usize, const FP4: bool>(simd: S, words: &[S::I; WORDS], out: &mut [Line]) {
    let mask = simd.splat_i(((1i32 << BITS) - 1).wrapping_mul(0x0101_0101));
    for (word, &codes) in words.iter().enumerate().take(out.len() * BITS / 8) {
        for step in 0..8 / BITS {
            let codes = match (BITS, step) {
                (8, _) => codes,
                (_, 0) => simd.and(codes, mask),
                (4, _) => simd.and(simd.shr::<4>(codes), mask),
                (_, 1) => simd.and(simd.shr::<2>(codes), mask),
                (_, 2) => simd.and(simd.shr::<4>(codes), mask),
                _ => simd.and(simd.shr::<6>(codes), mask),
            };
            let line = &mut out[word * (8 / BITS) + step];
            // SAFETY: a line has 64 bytes.
            unsafe { simd.store_i(line.0.as_mut_ptr(), if FP4 { simd.lookup(codes, &FP4_TABLE) } else { codes }) };
        }
    }
}
