//! Times the CPU kernels.
//!
//! ```text
//! cargo bench --bench kernels
//! cargo bench --bench kernels -- 'attention-decode/.*/4096'
//! OMLX_BENCH_ISA=all OMLX_BENCH_MB=1024 cargo bench --bench kernels -- matvec
//! ```
//!
//! What a group's throughput counts:
//!
//! | group | unit |
//! |---|---|
//! | `matvec` | bytes of weights, scales and biases read |
//! | `small-m`, `prefill` | multiply-adds: `M * rows * columns` |
//! | `experts-decode` | bytes of the chosen experts, or of a dense layer of the same width |
//! | `experts-prefill` | multiply-adds: `M * experts of a row * 3 * hidden * inner` |
//! | `attention-decode` | bytes of keys and values read |
//! | `attention-prefill` | multiply-adds: keys seen by each row `* heads * 2 * width` |
//! | `norm`, `rotary` | numbers written |
//! | `take-rows` | bytes of the table's rows read |
//!
//! Weights, keys and values come from memory, as in a model: each iteration takes other ones, out of `OMLX_BENCH_MB`
//! megabytes (256 by default). That has to be more than the last cache holds. Activations stay in the cache.
//!
//! `OMLX_BENCH_ISA=all` times every instruction set that the processor has instead of the best one. Kernels use all
//! physical cores; `matvec` also one and two threads.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use omlx::kernels::cpu::Isa;
use omlx::kernels::cpu::attention::{Attention, AttentionKind, PoolView, Segment};
use omlx::kernels::cpu::elementwise::{RmsNorm, Rotary, take_rows};
use omlx::kernels::cpu::experts::Experts;
use omlx::kernels::cpu::floats::{Floats, FloatsMut, Rows};
use omlx::kernels::cpu::matmul::{Finish, MatMul, Precision, Projection};
use omlx::kernels::cpu::matrix::{Coding, Matrix, Packed, Scales, Storage};
use omlx::kernels::cpu::routing::Chosen;
use omlx::kernels::cpu::threads::Workers;

/// Codes that share a scale.
const GROUP: usize = 64;

/// Query heads, heads of keys and values, and their width, of attention and rotary positions.
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const WIDTH: usize = 128;

/// Random 64-bit numbers (Marsaglia 2003, xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Between -1 and 1.
    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn shuffle(&mut self, items: &mut [u32]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
    }
}

/// Bytes that weights, or keys and values, are taken from.
fn memory_bytes() -> usize {
    let megabytes = std::env::var("OMLX_BENCH_MB").map_or(256, |text| match text.parse() {
        Ok(megabytes) => megabytes,
        Err(_) => panic!("OMLX_BENCH_MB is {text:?}, not a number"),
    });
    // The longest context needs 64 MB.
    megabytes.max(64) << 20
}

/// Codes of packed weights.
fn codes() -> &'static [u8] {
    static CODES: OnceLock<Vec<u8>> = OnceLock::new();
    CODES.get_or_init(|| {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut codes = Vec::with_capacity(memory_bytes());
        while codes.len() < memory_bytes() {
            codes.extend_from_slice(&random.next().to_le_bytes());
        }
        codes
    })
}

/// Numbers in bf16, their magnitudes between 0.5 and 1: no products too small for a processor's fast path.
fn numbers() -> &'static [u16] {
    static NUMBERS: OnceLock<Vec<u16>> = OnceLock::new();
    NUMBERS.get_or_init(|| {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let count = memory_bytes() / size_of::<u16>();
        let mut numbers = Vec::with_capacity(count);
        while numbers.len() < count {
            let bits = (random.next() & 0x807f_807f_807f_807f) | 0x3f00_3f00_3f00_3f00;
            numbers.extend((0..4).map(|i| (bits >> (16 * i)) as u16));
        }
        numbers
    })
}

/// How weights are stored.
#[derive(Clone, Copy)]
enum Format {
    /// Affine codes of so many bits; scales and biases in bf16.
    Affine(usize),
    /// Numbers in bf16.
    Bf16,
}

impl Format {
    fn name(self) -> String {
        match self {
            Format::Affine(bits) => format!("{bits}bit-g{GROUP}"),
            Format::Bf16 => "bf16".to_owned(),
        }
    }

    /// The precisions that make a difference.
    fn precisions(self) -> &'static [Precision] {
        match self {
            Format::Affine(_) => &[Precision::Fast, Precision::Exact],
            Format::Bf16 => &[Precision::Exact],
        }
    }
}

/// Matrices of one shape and format that share no byte.
struct Weights {
    matrices: Vec<Matrix<'static>>,
    /// Bytes of one.
    bytes: usize,
    next: Cell<usize>,
}

impl Weights {
    fn new(format: Format, rows: usize, columns: usize) -> Self {
        let (elements, groups) = (rows * columns, rows * columns / GROUP);
        let (storages, bytes): (Vec<Storage<'static>>, usize) = match format {
            Format::Affine(bits) => {
                let pieces = codes().chunks_exact(elements * bits / 8).zip(numbers().chunks_exact(2 * groups));
                let packed = pieces.map(|(codes, numbers)| {
                    let (scales, biases) = numbers.split_at(groups);
                    let scales = Scales::Affine(Floats::Bf16(scales), Floats::Bf16(biases));
                    Storage::Packed(Packed { codes, scales, coding: Coding::Affine(bits), group: GROUP })
                });
                (packed.collect(), elements * bits / 8 + groups * 4)
            }
            Format::Bf16 => {
                let pieces = numbers().chunks_exact(elements);
                (pieces.map(|numbers| Storage::Dense(Floats::Bf16(numbers))).collect(), elements * 2)
            }
        };
        let matrices = storages.into_iter().map(|storage| Matrix { rows, columns, storage }).collect();
        Self { matrices, bytes, next: Cell::new(0) }
    }

    /// The one that was not used for the longest time.
    fn next(&self) -> Matrix<'static> {
        let at = self.next.get();
        self.next.set((at + 1) % self.matrices.len());
        self.matrices[at]
    }
}

fn instruction_sets() -> Vec<Isa> {
    match std::env::var("OMLX_BENCH_ISA").as_deref() {
        Ok("all") => Isa::available(),
        Ok(other) => panic!("OMLX_BENCH_ISA is {other:?}; \"all\" is what it can be"),
        Err(_) => vec![Isa::best()],
    }
}

fn lower(value: impl std::fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

/// Times a product of `m` rows of activations, with `threads` or all.
fn product(
    group: &mut BenchmarkGroup<'_, WallTime>,
    (weights, format): (&Weights, Format),
    m: usize,
    threads: Option<usize>,
) {
    let Matrix { rows, columns, .. } = weights.matrices[0];
    let x = Random(1).floats(m * columns);
    let mut out = vec![0f32; m * rows];
    let workers = Workers::shared(threads);
    for isa in instruction_sets() {
        for &precision in format.precisions() {
            let precision_name =
                if format.precisions().len() > 1 { format!("-{}", lower(precision)) } else { String::new() };
            let count = workers.count();
            let name = format!("{}{precision_name}/{rows}x{columns}/m{m}/{}/{count}t", format.name(), lower(isa));
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let projections = [Projection { matrix: weights.next(), bias: None }];
                    let (finish, projections) = (Finish::Concat, &projections);
                    MatMul { x: &x, projections, experts: None, stacked: 1, finish, precision }.run(
                        isa,
                        &workers,
                        FloatsMut::F32(&mut out),
                    );
                });
            });
        }
    }
}

fn matvec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matvec");
    let all = Workers::shared(None).count();
    for format in [Format::Affine(4), Format::Affine(8), Format::Bf16] {
        let weights = Weights::new(format, 4096, 4096);
        group.throughput(Throughput::Bytes(weights.bytes as u64));
        for threads in BTreeSet::from([1, 2, all]) {
            product(&mut group, (&weights, format), 1, Some(threads));
        }
    }
    group.finish();
}

fn small_m(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("small-m");
    let format = Format::Affine(4);
    let weights = Weights::new(format, 4096, 4096);
    for m in [2, 4, 8, 16] {
        group.throughput(Throughput::Elements((m * 4096 * 4096) as u64));
        product(&mut group, (&weights, format), m, None);
    }
    group.finish();
}

fn prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prefill");
    group.throughput(Throughput::Elements(512 * 3072 * 1024));
    for format in [Format::Affine(4), Format::Bf16] {
        let weights = Weights::new(format, 3072, 1024);
        product(&mut group, (&weights, format), 512, None);
    }
    group.finish();
}

/// A layer of Qwen3-30B-A3B: experts of a token, width of the rows, and width inside of an expert.
const PER_TOKEN: usize = 8;
const HIDDEN: usize = 2048;
const INNER: usize = 768;

/// Gate, up and down of as many experts as there is memory for, up to 128, in 4 bits.
fn mixture(isa: Isa, workers: &Workers) -> impl FnMut(&[f32], &Chosen, &mut [f32]) + use<'_> {
    let count = mixture_experts();
    let (elements, groups) = (count * HIDDEN * INNER, count * HIDDEN * INNER / GROUP);
    let mut pieces = codes().chunks_exact(elements / 2).zip(numbers().chunks_exact(2 * groups));
    let mut stack = |rows, columns| {
        let (codes, numbers) = pieces.next().expect("memory for three stacks");
        let (scales, biases) = numbers.split_at(groups);
        let scales = Scales::Affine(Floats::Bf16(scales), Floats::Bf16(biases));
        let storage = Storage::Packed(Packed { codes, scales, coding: Coding::Affine(4), group: GROUP });
        Projection { matrix: Matrix { rows, columns, storage }, bias: None }
    };
    let inputs = [stack(INNER, HIDDEN), stack(INNER, HIDDEN)];
    let output = stack(HIDDEN, INNER);
    move |x, chosen, out| {
        let (finish, precision) = (Finish::SwiGlu, Precision::Fast);
        Experts { count, inputs: &inputs, finish, output, weighs_input: false, precision }
            .run(isa, workers, x, chosen, out);
    }
}

fn mixture_experts() -> usize {
    (memory_bytes() / (3 * HIDDEN * INNER / 2)).min(128)
}

/// The experts of some rows, those of the last ones last.
fn choices(rows: usize) -> impl FnMut() -> Chosen {
    let mut random = Random(7);
    let mut order: Vec<u32> = (0..mixture_experts() as u32).collect();
    random.shuffle(&mut order);
    let mut at = 0;
    move || {
        let mut experts = Vec::with_capacity(rows * PER_TOKEN);
        for _ in 0..rows {
            if rows > 1 {
                random.shuffle(&mut order);
            }
            at = if at + 2 * PER_TOKEN > order.len() { 0 } else { at + PER_TOKEN };
            experts.extend_from_slice(&order[at..at + PER_TOKEN]);
        }
        Chosen { weights: vec![0.125; experts.len()], experts, per_token: PER_TOKEN }
    }
}

/// One token through its experts, and through a dense layer as wide as all of them together.
fn experts_decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("experts-decode");
    let x = Random(8).floats(HIDDEN);
    let all = Workers::shared(None).count();
    let (up, down) = (
        Weights::new(Format::Affine(4), PER_TOKEN * INNER, HIDDEN),
        Weights::new(Format::Affine(4), HIDDEN, PER_TOKEN * INNER),
    );
    group.throughput(Throughput::Bytes((2 * up.bytes + down.bytes) as u64));
    for threads in BTreeSet::from([1, all]) {
        let workers = Workers::shared(Some(threads));
        for isa in instruction_sets() {
            let (mut mixture, mut choices, mut out) = (mixture(isa, &workers), choices(1), vec![0f32; HIDDEN]);
            group.bench_function(format!("mixture/{}/{threads}t", lower(isa)), |bencher| {
                bencher.iter(|| mixture(&x, &choices(), &mut out));
            });
            let mut inner = vec![0f32; PER_TOKEN * INNER];
            group.bench_function(format!("dense/{}/{threads}t", lower(isa)), |bencher| {
                bencher.iter(|| {
                    let run = |x: &[f32], projections: &[Projection<'_>], finish, out: &mut [f32]| {
                        let (experts, stacked, precision) = (None, 1, Precision::Fast);
                        let product = MatMul { x, projections, experts, stacked, finish, precision };
                        product.run(isa, &workers, FloatsMut::F32(out));
                    };
                    let [gate, up] = [up.next(), up.next()].map(|matrix| Projection { matrix, bias: None });
                    run(&x, &[gate, up], Finish::SwiGlu, &mut inner);
                    run(&inner, &[Projection { matrix: down.next(), bias: None }], Finish::Concat, &mut out);
                });
            });
        }
    }
    group.finish();
}

fn experts_prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("experts-prefill");
    let workers = Workers::shared(None);
    for rows in [16, 512] {
        let x = Random(9).floats(rows * HIDDEN);
        let mut out = vec![0f32; x.len()];
        group.throughput(Throughput::Elements((rows * PER_TOKEN * 3 * HIDDEN * INNER) as u64));
        for isa in instruction_sets() {
            let (mut mixture, chosen) = (mixture(isa, &workers), choices(rows)());
            group.bench_function(format!("m{rows}/{}/{}t", lower(isa), workers.count()), |bencher| {
                bencher.iter(|| mixture(&x, &chosen, &mut out));
            });
        }
    }
    group.finish();
}

/// Pools of keys and values that take all memory, and the ids of all their blocks, shuffled: what one sequence after
/// another takes its table from.
struct Pools {
    keys: PoolView<'static>,
    values: PoolView<'static>,
    tables: Vec<u32>,
    block_tokens: usize,
    next: Cell<usize>,
}

impl Pools {
    fn new(block_tokens: usize) -> Self {
        let block = block_tokens * KV_HEADS * WIDTH;
        let blocks = numbers().len() / 2 / block;
        let (keys, values) = numbers().split_at(blocks * block);
        let mut tables: Vec<u32> = (0..blocks as u32).collect();
        Random(2).shuffle(&mut tables);
        let view = |numbers| PoolView::new(Floats::Bf16(numbers), WIDTH);
        Self { keys: view(keys), values: view(&values[..blocks * block]), tables, block_tokens, next: Cell::new(0) }
    }

    /// The table of a sequence of `tokens`, from other blocks than the last one.
    fn table(&self, tokens: usize) -> &[u32] {
        let blocks = tokens.div_ceil(self.block_tokens);
        let at = if self.next.get() + blocks > self.tables.len() { 0 } else { self.next.get() };
        self.next.set(at + blocks);
        &self.tables[at..at + blocks]
    }

    /// Times attention of `rows` tokens that follow `start` others, on all cores.
    fn attend(&self, group: &mut BenchmarkGroup<'_, WallTime>, rows: usize, start: usize) {
        let kind = AttentionKind {
            kv_heads: KV_HEADS,
            heads: HEADS,
            scale: (WIDTH as f32).powf(-0.5),
            window: None,
            soft_cap: None,
        };
        let queries = Random(3).floats(rows * HEADS * WIDTH);
        let mut out = vec![0f32; queries.len()];
        let segments = [Segment { rows: 0..rows, start, table: 0 }];
        let workers = Workers::shared(None);
        for isa in instruction_sets() {
            let name = format!("bf16/block{}/{}/{}/{}t", self.block_tokens, start + rows, lower(isa), workers.count());
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let attention = Attention {
                        kind: &kind,
                        queries: &queries,
                        keys: self.keys,
                        values: self.values,
                        block_tokens: self.block_tokens,
                        tables: self.table(start + rows),
                        segments: &segments,
                        sinks: None,
                        precision: Precision::Fast,
                    };
                    attention.run(isa, &workers, FloatsMut::F32(&mut out));
                });
            });
        }
    }
}

fn attention_decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention-decode");
    for block_tokens in [256, 16] {
        let pools = Pools::new(block_tokens);
        for context in [512, 4096, 16384] {
            group.throughput(Throughput::Bytes((context * KV_HEADS * WIDTH * 2 * size_of::<u16>()) as u64));
            pools.attend(&mut group, 1, context - 1);
        }
    }
    group.finish();
}

fn attention_prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention-prefill");
    let pools = Pools::new(256);
    let rows = 512;
    for start in [512, 2048] {
        let seen: usize = (0..rows).map(|row| start + row + 1).sum();
        group.throughput(Throughput::Elements((seen * HEADS * 2 * WIDTH) as u64));
        pools.attend(&mut group, rows, start);
    }
    group.finish();
}

fn norm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("norm");
    let width = 4096;
    let workers = Workers::shared(None);
    let norm = RmsNorm { weight: Floats::Bf16(&numbers()[..width]), eps: 1e-6 };
    for rows in [1, 512] {
        let x = Random(4).floats(rows * width);
        let mut out = vec![0f32; x.len()];
        group.throughput(Throughput::Elements(x.len() as u64));
        for isa in instruction_sets() {
            group.bench_function(format!("{rows}x{width}/{}/{}t", lower(isa), workers.count()), |bencher| {
                bencher.iter(|| norm.run(isa, &workers, &x, FloatsMut::F32(&mut out)));
            });
        }
    }
    group.finish();
}

/// With the norm of each head.
fn rotary(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rotary");
    let workers = Workers::shared(None);
    let frequencies: Vec<f32> = (0..WIDTH / 2).map(|i| 1e6f32.powf(-((2 * i) as f32) / WIDTH as f32)).collect();
    let rotary = Rotary {
        width: WIDTH,
        dims: WIDTH,
        frequencies: &frequencies,
        traditional: false,
        magnitude: 1.0,
        norm: Some(RmsNorm { weight: Floats::Bf16(&numbers()[..WIDTH]), eps: 1e-6 }),
        turned_first: false,
    };
    for tokens in [1usize, 512] {
        let x = Random(5).floats(tokens * HEADS * WIDTH);
        let positions: Vec<usize> = (1000..).take(tokens).collect();
        let mut out = vec![0f32; x.len()];
        group.throughput(Throughput::Elements(x.len() as u64));
        for isa in instruction_sets() {
            group.bench_function(format!("{tokens}x{HEADS}x{WIDTH}/{}/{}t", lower(isa), workers.count()), |bencher| {
                bencher.iter(|| {
                    rotary.run(isa, &workers, Rows::packed(&x, HEADS * WIDTH), &positions, FloatsMut::F32(&mut out))
                });
            });
        }
    }
    group.finish();
}

/// Rows of a table with Qwen3's vocabulary, as a prompt's tokens take them.
fn rows_of_a_table(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("take-rows");
    let workers = Workers::shared(None);
    let (count, columns) = (512, 1024);
    for format in [Format::Affine(4), Format::Bf16] {
        // As much of the vocabulary as there is memory for.
        let rows = (numbers().len() / columns).min(151_936);
        let weights = Weights::new(format, rows, columns);
        let table = weights.next();
        let mut ids: Vec<u32> = (0..rows as u32).collect();
        Random(6).shuffle(&mut ids);
        let mut prompts = ids.chunks_exact(count).cycle();
        let mut out = vec![0f32; count * columns];
        group.throughput(Throughput::Bytes((weights.bytes / rows * count) as u64));
        for isa in instruction_sets() {
            let name = format!("{}/{count}x{columns}/{}/{}t", format.name(), lower(isa), workers.count());
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let ids = prompts.next().unwrap_or_default();
                    let out = FloatsMut::F32(&mut out[..ids.len() * columns]);
                    take_rows(isa, &workers, &table, ids, out);
                });
            });
        }
    }
    group.finish();
}

fn config() -> Criterion {
    let short = Criterion::default().sample_size(10).without_plots();
    short.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = kernels;
    config = config();
    targets = matvec, small_m, prefill, experts_decode, experts_prefill, attention_decode, attention_prefill, norm, rotary, rows_of_a_table
}
criterion_main!(kernels);
