//! Mixtures against a loop over all tokens and experts in f64: every kind of router, format and layout, by both backends.

use std::collections::BTreeMap;
use std::path::Path;

use mlx_rs::Array;
use safetensors::tensor::{Dtype as FileDtype, TensorView};
use serde_json::{Value, json};

use super::*;
use crate::config::ModelConfig;
use crate::kernels::{GroupScore, Groups, Normalize, Precision, Scores, Ties};
use crate::mlx::Device;

const HIDDEN: usize = 96;
const INNER: usize = 64;
const EXPERTS: usize = 8;
const GROUP: usize = 32;
const EPS: f32 = 1e-5;

/// How matrices are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Dense,
    Affine(usize),
    Mxfp4,
}

/// Random numbers (SplitMix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -size and size.
    fn floats(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| ((self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0) * size).collect()
    }
}

/// Tensors of a file by name.
#[derive(Clone, Default)]
struct Tensors(BTreeMap<String, (FileDtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn floats(&mut self, name: &str, shape: &[usize], numbers: &[f32]) -> Vec<f64> {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0.insert(name.to_owned(), (FileDtype::F32, shape.to_vec(), bytes));
        numbers.iter().map(|&x| f64::from(x)).collect()
    }

    /// Matrices `shape [.., rows, columns]` at `path`; the numbers that they stand for.
    fn matrix(&mut self, random: &mut Random, path: &str, format: Format, shape: &[usize]) -> Vec<f64> {
        let count: usize = shape.iter().product();
        let (lead, columns) = (&shape[..shape.len() - 1], shape[shape.len() - 1]);
        let size = 2.0 / (columns as f32).sqrt();
        let with = |last: usize| [lead, &[last]].concat();
        let words = |bits: usize| with(columns * bits / 32);
        match format {
            Format::Dense => self.floats(&format!("{path}.weight"), shape, &random.floats(count, size)),
            Format::Affine(bits) => {
                let codes: Vec<u8> = (0..count).map(|_| (random.bits() % (1 << bits)) as u8).collect();
                let bytes = if bits == 8 { codes.clone() } else { codes.chunks(2).map(|c| c[0] | c[1] << 4).collect() };
                self.0.insert(format!("{path}.weight"), (FileDtype::U32, words(bits), bytes));
                let step = 2.0 * size / ((1 << bits) - 1) as f32;
                let numbers = |random: &mut Random, middle: f32| -> Vec<f32> {
                    random.floats(count / GROUP, 0.2).into_iter().map(|x| middle * (1.0 + x)).collect()
                };
                let (scales, biases) = (numbers(random, step), numbers(random, -size));
                let groups = with(columns / GROUP);
                self.floats(&format!("{path}.scales"), &groups, &scales);
                self.floats(&format!("{path}.biases"), &groups, &biases);
                let value = |(i, &code): (usize, &u8)| {
                    f64::from(scales[i / GROUP]) * f64::from(code) + f64::from(biases[i / GROUP])
                };
                codes.iter().enumerate().map(value).collect()
            }
            Format::Mxfp4 => {
                let codes: Vec<u8> = (0..count).map(|_| (random.bits() % 16) as u8).collect();
                let bytes = codes.chunks(2).map(|c| c[0] | c[1] << 4).collect();
                let scales: Vec<u8> = (0..count / GROUP).map(|_| 122 + (random.bits() % 3) as u8).collect();
                self.0.insert(format!("{path}.weight"), (FileDtype::U32, words(4), bytes));
                self.0.insert(format!("{path}.scales"), (FileDtype::U8, with(columns / GROUP), scales.clone()));
                let value = |(i, &code): (usize, &u8)| {
                    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code % 8)];
                    (if code < 8 { magnitude } else { -magnitude }) * 2f64.powi(i32::from(scales[i / GROUP]) - 127)
                };
                codes.iter().enumerate().map(value).collect()
            }
        }
    }

    fn save(&self, folder: &Path) {
        let views = self
            .0
            .iter()
            .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }

    fn part(&mut self, name: &str) -> (FileDtype, Vec<usize>, Vec<u8>) {
        self.0.remove(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
}

/// A mixture as files and as numbers.
#[derive(Clone)]
struct Mixture {
    spec: ExpertsSpec,
    config: Value,
    tensors: Tensors,
    router: Vec<f64>,
    router_bias: Vec<f64>,
    router_norm: Vec<f64>,
    correction: Vec<f64>,
    expert_scales: Vec<f64>,
    /// Gate, up and down with their biases.
    stacks: [(Vec<f64>, Vec<f64>); 3],
    shared: [Vec<f64>; 3],
    shared_gate: Vec<f64>,
    /// To narrower rows and back, with their biases.
    latent: Option<[(Vec<f64>, Vec<f64>); 2]>,
}

impl Mixture {
    /// Experts in one format, their router in another.
    fn new(spec: ExpertsSpec, format: Format, router_format: Format) -> Self {
        let (random, mut tensors) = (&mut Random(7), Tensors::default());
        let t = &mut tensors;
        let RouterSpec { path, bias, norm, correction, expert_scales, .. } = spec.router;
        let name = |part: &str| format!("layer.{part}");
        let router = t.matrix(random, &name(path), router_format, &[EXPERTS, HIDDEN]);
        let mut numbers = |random: &mut Random, part: Option<&str>, count: usize, size: f32, plus: f32| {
            let numbers: Vec<f32> = random.floats(count, size).into_iter().map(|x| x + plus).collect();
            part.map_or_else(|| vec![f64::from(plus); count], |part| t.floats(&name(part), &[count], &numbers))
        };
        let bias_name = format!("{path}.bias");
        let router_bias = numbers(random, bias.then_some(&bias_name), EXPERTS, 1.0, 0.0);
        let router_norm = numbers(random, norm.map(|(part, _)| part), HIDDEN, 3.0, 9.0);
        let correction = numbers(random, correction, EXPERTS, 0.5, 0.0);
        let expert_scales = numbers(random, expert_scales, EXPERTS, 0.5, 1.0);
        let gated = spec.activation.is_gated();
        let mut stack = |which: usize, rows: usize, columns: usize| {
            let path = name(&format!("{}.{}", spec.stacked, spec.projections[which]));
            if which == 0 && !gated {
                return Default::default();
            }
            let values = t.matrix(random, &path, format, &[EXPERTS, rows, columns]);
            let biases = random.floats(EXPERTS * rows, 0.5);
            let none = vec![0.0; biases.len()];
            let has = spec.bias;
            (values, if has { t.floats(&format!("{path}.bias"), &[EXPERTS, rows], &biases) } else { none })
        };
        let width = spec.width(HIDDEN);
        let stacks = [stack(0, INNER, width), stack(1, INNER, width), stack(2, width, INNER)];
        let latent = spec.latent.as_ref().map(|latent| {
            let shapes = [[width, HIDDEN], [HIDDEN, width]];
            [0, 1].map(|at| {
                let (path, rows) = (name(latent.names[at]), shapes[at][0]);
                let values = t.matrix(random, &path, format, &shapes[at]);
                let biases = random.floats(rows, if latent.bias { 0.5 } else { 0.0 });
                let biases =
                    if latent.bias { t.floats(&format!("{path}.bias"), &[rows], &biases) } else { vec![0.0; rows] };
                (values, biases)
            })
        });
        let (mut shared, mut shared_gate) = (<[Vec<f64>; 3]>::default(), Vec::new());
        if let Some(SharedSpec { path, inner, gate, .. }) = spec.shared {
            let shapes = [[inner, HIDDEN], [inner, HIDDEN], [HIDDEN, inner]];
            for (which, (shape, part)) in shapes.iter().zip(PROJECTIONS).enumerate() {
                if which > 0 || gated {
                    shared[which] = t.matrix(random, &name(&format!("{path}.{part}")), format, shape);
                }
            }
            if let Some(gate) = gate {
                shared_gate = t.matrix(random, &name(gate), router_format, &[1, HIDDEN]);
            }
        }
        let described = |format| match format {
            Format::Dense => Value::Bool(false),
            Format::Affine(bits) => json!({"group_size": GROUP, "bits": bits, "mode": "affine"}),
            Format::Mxfp4 => json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        };
        let mut config = json!({"model_type": "mixture"});
        if [format, router_format] != [Format::Dense; 2] {
            // The router's format is an exception, as MLX's tools write it; what has no scales is dense in any case.
            config["quantization"] = described(if format == Format::Dense { router_format } else { format });
            config["quantization"][name(path)] = described(router_format);
            if let Some(gate) = spec.shared.as_ref().and_then(|shared| shared.gate) {
                config["quantization"][name(gate)] = described(router_format);
            }
        }
        Self {
            spec,
            config,
            tensors,
            router,
            router_bias,
            router_norm,
            correction,
            expert_scales,
            stacks,
            shared,
            shared_gate,
            latent,
        }
    }

    /// What a backend gives of `x`, and whether it left no tensor.
    fn run(&self, backend: &Backend, x: &[f32], routed_by: Option<&[f32]>) -> Result<Vec<f32>> {
        let folder = tempfile::tempdir().unwrap();
        self.tensors.save(folder.path());
        mlx::init()?;
        mlx::on_device(Device::Cpu, || {
            let config = ModelConfig::from_value(self.config.clone())?;
            let mut weights = Weights::open(folder.path(), &config, None)?.computed_by(backend.clone());
            let experts = Experts::load(&mut weights, "layer", HIDDEN, &self.spec)?;
            assert_eq!(experts.kernels().is_some(), matches!(backend, Backend::Cpu(_)), "the wrong backend");
            weights.finish()?;
            let rows = |x: &[f32]| Array::from_slice(x, &[(x.len() / HIDDEN) as i32, HIDDEN as i32]);
            let y = experts.forward_routed(&rows(x), None, routed_by.map(rows).as_ref(), None)?;
            y.eval()?;
            crate::kernels::check()?;
            assert_eq!(y.shape(), [(x.len() / HIDDEN) as i32, HIDDEN as i32]);
            Ok(y.as_slice::<f32>().to_vec())
        })
    }
}

fn product(weights: &[f64], x: &[f64]) -> Vec<f64> {
    weights.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let sum: f64 = x.iter().map(|x| x.exp()).sum();
    x.iter().map(|x| x.exp() / sum).collect()
}

fn activated(activation: ExpertActivation, gate: &[f64], up: &[f64]) -> Vec<f64> {
    let at = |i: usize| {
        let (g, u) = (gate.get(i).copied().unwrap_or_default(), up[i]);
        match activation {
            ExpertActivation::SwiGlu => g * sigmoid(g) * u,
            ExpertActivation::GeGlu => {
                let y = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                g / 2.0 * (1.0 + y.tanh()) * u
            }
            ExpertActivation::ClampedSwiGlu { alpha, limit } => {
                let (g, limit) = (g.min(f64::from(limit)), f64::from(limit));
                (u.clamp(-limit, limit) + 1.0) * g * sigmoid(f64::from(alpha) * g)
            }
            ExpertActivation::SquaredRelu => u.max(0.0).powi(2),
        }
    };
    (0..up.len()).map(at).collect()
}

/// The definition, one token after another.
impl Mixture {
    fn chosen(&self, x: &[f64]) -> Vec<(usize, f64)> {
        let spec = &self.spec.router;
        let mut x = x.to_vec();
        if let Some((_, eps)) = spec.norm {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / ((mean + f64::from(eps)).sqrt() * (HIDDEN as f64).sqrt());
            x.iter_mut().zip(&self.router_norm).for_each(|(x, weight)| *x *= scale * weight);
        }
        let logits: Vec<f64> = product(&self.router, &x).iter().zip(&self.router_bias).map(|(x, b)| x + b).collect();
        let values = match spec.scores {
            Scores::Softmax => softmax(&logits),
            Scores::Sigmoid => logits.iter().map(|&x| sigmoid(x)).collect(),
            Scores::SoftmaxOfChosen | Scores::SigmoidOfChosen => logits,
        };
        let mut keys: Vec<f64> = values.iter().zip(&self.correction).map(|(value, c)| value + c).collect();
        let best = |x: &[f64], count: usize, ties: Ties| {
            let mut order: Vec<usize> = (0..x.len()).collect();
            if ties == Ties::Last {
                order.reverse();
            }
            order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
            order.truncate(count);
            order
        };
        if let Some(Groups { count, kept, by }) = spec.groups {
            let size = EXPERTS / count;
            let taken = if by == GroupScore::TwoBest { 2 } else { 1 };
            let score = |group: &[f64]| best(group, taken, Ties::First).iter().map(|&i| group[i]).sum::<f64>();
            let kept = best(&keys.chunks(size).map(score).collect::<Vec<_>>(), kept, Ties::Last);
            keys.iter_mut().enumerate().filter(|(i, _)| !kept.contains(&(i / size))).for_each(|(_, key)| *key = 0.0);
        }
        let ids = best(&keys, self.spec.per_token, spec.ties);
        let chosen: Vec<f64> = ids.iter().map(|&id| values[id]).collect();
        let weights = match spec.scores {
            Scores::Softmax | Scores::Sigmoid => chosen,
            Scores::SoftmaxOfChosen => softmax(&chosen),
            Scores::SigmoidOfChosen => chosen.iter().map(|&x| sigmoid(x)).collect(),
        };
        let sum: f64 = weights.iter().sum();
        let divisor = match spec.normalize {
            Normalize::No => 1.0,
            Normalize::SumPlus(more) => sum + f64::from(more),
            Normalize::SumAtLeast(least) => sum.max(f64::from(least)),
        };
        let scaled = |(&id, w): (&usize, f64)| (id, w / divisor * f64::from(spec.scale) * self.expert_scales[id]);
        ids.iter().zip(weights).map(scaled).collect()
    }

    fn expert(&self, id: usize, x: &[f64]) -> Vec<f64> {
        let part = |which: usize, x: &[f64]| -> Vec<f64> {
            let (values, biases) = &self.stacks[which];
            let (size, rows) = (values.len() / EXPERTS, biases.len() / EXPERTS);
            let y = product(&values[id * size..(id + 1) * size], x);
            y.iter().zip(&biases[id * rows..]).map(|(y, b)| y + b).collect()
        };
        let gate = if self.spec.activation.is_gated() { part(0, x) } else { Vec::new() };
        part(2, &activated(self.spec.activation, &gate, &part(1, x)))
    }

    fn reference(&self, x: &[f32], routed_by: &[f32]) -> Vec<f64> {
        let mut out = Vec::with_capacity(x.len());
        for (x, by) in x.chunks(HIDDEN).zip(routed_by.chunks(HIDDEN)) {
            let [x, by] = [x, by].map(|row| row.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
            let mut y = vec![0.0; HIDDEN];
            let mut add =
                |more: Vec<f64>, weight: f64| y.iter_mut().zip(more).for_each(|(y, more)| *y += weight * more);
            let linear = |(weights, biases): &(Vec<f64>, Vec<f64>), x: &[f64]| -> Vec<f64> {
                product(weights, x).iter().zip(biases).map(|(y, b)| y + b).collect()
            };
            let taken = self.latent.as_ref().map_or(x.clone(), |[narrow, _]| linear(narrow, &x));
            let mut given = vec![0.0; taken.len()];
            for (id, weight) in self.chosen(&by) {
                let scaled: Vec<f64> = taken.iter().map(|x| x * weight).collect();
                let (x, weight) = if self.spec.weighs_input { (&scaled, 1.0) } else { (&taken, weight) };
                given.iter_mut().zip(self.expert(id, x)).for_each(|(y, more)| *y += weight * more);
            }
            add(self.latent.as_ref().map_or(given.clone(), |[_, wide]| linear(wide, &given)), 1.0);
            if self.spec.shared.is_some() {
                let [gate, up, down] = &self.shared;
                let gate = if gate.is_empty() { Vec::new() } else { product(gate, &x) };
                let inner = activated(self.spec.activation, &gate, &product(up, &x));
                let weight = if self.shared_gate.is_empty() { 1.0 } else { sigmoid(product(&self.shared_gate, &x)[0]) };
                add(product(down, &inner), weight);
            }
            out.extend(y);
        }
        out
    }
}

fn backends() -> [Backend; 2] {
    [Backend::Mlx, Backend::Cpu(Cpu::new(Some(2), Precision::Exact))]
}

fn difference(found: &[f32], expected: &[f64]) -> f64 {
    let size: f64 = expected.iter().map(|x| x * x).sum();
    let error: f64 = found.iter().zip(expected).map(|(&found, x)| (f64::from(found) - x).powi(2)).sum();
    (error / size).sqrt()
}

/// What f32 may miss.
const BOUND: f64 = 2e-6;

/// Few tokens, and more than MLX computes unsorted.
const TOKENS: [usize; 3] = [1, 5, 50];

fn check(what: &str, mixture: &Mixture) {
    for backend in backends() {
        for tokens in TOKENS {
            let x = Random(tokens as u64).floats(tokens * HIDDEN, 1.0);
            let found = mixture.run(&backend, &x, None).unwrap();
            let error = difference(&found, &mixture.reference(&x, &x));
            assert!(error <= BOUND, "{what}, {}, {tokens} tokens: off by {error:e}", backend.numerics());
        }
    }
}

fn spec(router: RouterSpec) -> ExpertsSpec {
    ExpertsSpec::new(EXPERTS, 3, INNER, router)
}

const CLAMPED: ExpertActivation = ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 1.0 };

/// Every router there is, as the architectures have them.
fn routers() -> Vec<(&'static str, ExpertsSpec)> {
    let shared = |path, gate| Some(SharedSpec { gate, ..SharedSpec::new(path, 32) });
    let corrected = |groups, kept, eps| RouterSpec::corrected_sigmoid(groups, kept, eps, 2.5);
    let of_chosen = RouterSpec::softmax_of_chosen;
    vec![
        ("qwen3_moe", spec(RouterSpec::softmax(true))),
        (
            "qwen2_moe",
            ExpertsSpec {
                shared: shared("shared_expert", Some("shared_expert_gate")),
                ..spec(RouterSpec { ties: Ties::First, ..RouterSpec::softmax(false) })
            },
        ),
        ("mixtral", spec(RouterSpec { ties: Ties::First, ..of_chosen("gate") })),
        (
            "gpt_oss",
            ExpertsSpec {
                bias: true,
                stacked: "experts",
                activation: CLAMPED,
                ..spec(RouterSpec { bias: true, ..of_chosen("router") })
            },
        ),
        ("deepseek_v3", ExpertsSpec { shared: shared("shared_experts", None), ..spec(corrected(4, 2, Some(0.0))) }),
        ("one group", spec(corrected(1, 1, Some(1e-20)))),
        (
            "minimax",
            spec(RouterSpec {
                correction: Some("e_score_correction_bias"),
                scale: 1.0,
                ..corrected(1, 1, Some(1e-20))
            }),
        ),
        ("one expert of a sigmoid", ExpertsSpec { per_token: 1, ..spec(corrected(2, 1, None)) }),
        (
            "deepseek_v2",
            spec(RouterSpec {
                groups: Some(Groups { count: 4, kept: 2, by: GroupScore::Best }),
                ..RouterSpec::softmax(false)
            }),
        ),
        (
            "llama4",
            ExpertsSpec {
                per_token: 1,
                weighs_input: true,
                stacked: "experts",
                shared: shared("shared_expert", None),
                ..spec(RouterSpec::sigmoid_of_chosen("router"))
            },
        ),
        ("weighed inputs of several", ExpertsSpec { weighs_input: true, ..spec(RouterSpec::softmax(true)) }),
        (
            "lfm2_moe",
            spec(RouterSpec { correction: Some("expert_bias"), ties: Ties::Last, ..corrected(1, 1, Some(1e-6)) }),
        ),
        ("ernie4_5_moe", spec(RouterSpec { normalize: Normalize::SumAtLeast(0.8), ..RouterSpec::softmax(true) })),
        ("nemotron_h", nemotron()),
        ("nemotron_h in narrower rows", ExpertsSpec { latent: narrower(true), ..nemotron() }),
        ("narrower rows without biases", ExpertsSpec { latent: narrower(false), ..spec(RouterSpec::softmax(true)) }),
    ]
}

fn nemotron() -> ExpertsSpec {
    ExpertsSpec {
        activation: ExpertActivation::SquaredRelu,
        projections: ["", "fc1", "fc2"],
        shared: Some(SharedSpec::new("shared_experts", 32)),
        ..spec(RouterSpec::corrected_sigmoid(1, 1, Some(1e-20), 2.5))
    }
}

fn narrower(bias: bool) -> Option<LatentExpertsSpec> {
    Some(LatentExpertsSpec { width: 64, bias, names: ["fc1_latent_proj", "fc2_latent_proj"] })
}

fn gemma() -> ExpertsSpec {
    let router = RouterSpec {
        norm: Some(("router.scale", EPS)),
        expert_scales: Some("router.per_expert_scale"),
        ..RouterSpec::softmax_of_chosen("router.proj")
    };
    ExpertsSpec { stacked: "experts.switch_glu", activation: ExpertActivation::GeGlu, ..spec(router) }
}

#[test]
fn every_router_chooses_and_weighs_as_defined() {
    for (what, spec) in routers() {
        check(what, &Mixture::new(spec, Format::Dense, Format::Dense));
    }
}

#[test]
fn every_format_is_computed_with_a_router_in_another() {
    let formats = [Format::Affine(4), Format::Affine(8), Format::Mxfp4];
    for (format, router) in formats.into_iter().zip([Format::Affine(8), Format::Dense, Format::Affine(8)]) {
        for (what, spec) in routers() {
            if ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h in narrower rows"].contains(&what) {
                check(&format!("{what} {format:?}"), &Mixture::new(spec, format, router));
            }
        }
    }
}

/// Gemma 4 chooses by other rows than experts take.
#[test]
fn experts_are_chosen_by_rows_of_their_own() {
    let mixture = Mixture::new(gemma(), Format::Affine(4), Format::Affine(8));
    for (backend, tokens) in backends().into_iter().zip(TOKENS) {
        let (x, by) = (Random(1).floats(tokens * HIDDEN, 1.0), Random(2).floats(tokens * HIDDEN, 4.0));
        let found = mixture.run(&backend, &x, Some(&by)).unwrap();
        let error = difference(&found, &mixture.reference(&x, &by));
        assert!(error <= BOUND, "{}: off by {error:e}", backend.numerics());
        assert!(difference(&found, &mixture.reference(&x, &x)) > 0.1, "the rows do not matter");
    }
    check("gemma4", &mixture);
}

/// A norm before and a residual behind are those of the separate operations.
#[test]
fn a_norm_and_a_residual_go_with_it() {
    let mixture = Mixture::new(routers().swap_remove(0).1, Format::Affine(4), Format::Affine(8));
    let mut mixture = mixture.clone();
    let weight = Random(3).floats(HIDDEN, 1.0);
    mixture.tensors.floats("norm.weight", &[HIDDEN], &weight);
    let folder = tempfile::tempdir().unwrap();
    mixture.tensors.save(folder.path());
    mlx::init().unwrap();
    for backend in backends() {
        let outcome = mlx::on_device(Device::Cpu, || {
            let config = ModelConfig::from_value(mixture.config.clone())?;
            let mut weights = Weights::open(folder.path(), &config, None)?.computed_by(backend.clone());
            let experts = Experts::load(&mut weights, "layer", HIDDEN, &mixture.spec)?;
            let norm = RmsNorm::load(&mut weights, "norm", HIDDEN, EPS)?;
            let x = Array::from_slice(&Random(4).floats(3 * HIDDEN, 2.0), &[3, HIDDEN as i32]);
            let together = experts.forward(&x, Some(&norm), Some(&x))?;
            let apart = x.add(experts.forward(&norm.forward(&x)?, None, None)?)?;
            together.eval()?;
            apart.eval()?;
            let apart: Vec<f64> = apart.as_slice::<f32>().iter().map(|&x| f64::from(x)).collect();
            assert!(difference(together.as_slice::<f32>(), &apart) <= BOUND, "{}", backend.numerics());
            Ok(())
        });
        outcome.unwrap();
    }
}

/// A router that knows no difference: which of equals are chosen is part of the rule.
#[test]
fn of_equals_both_backends_choose_the_same() {
    for (what, spec) in routers() {
        for ties in [Ties::First, Ties::Last] {
            let router = RouterSpec { ties, correction: None, bias: false, ..spec.router.clone() };
            let mut mixture = Mixture::new(ExpertsSpec { router, ..spec.clone() }, Format::Dense, Format::Dense);
            let path = format!("layer.{}.weight", spec.router.path);
            mixture.router = mixture.tensors.floats(&path, &[EXPERTS, HIDDEN], &[0.0; EXPERTS * HIDDEN]);
            check(&format!("{what}, {ties:?}"), &mixture);
        }
    }
}

/// In exact precision a token's bits do not depend on the others.
#[test]
fn exact_tokens_do_not_depend_on_others() {
    let backend = &backends()[1];
    for (what, format) in [("qwen3_moe", Format::Affine(4)), ("gpt_oss", Format::Mxfp4), ("deepseek_v3", Format::Dense)]
    {
        let spec = routers().into_iter().find(|(name, _)| *name == what).unwrap().1;
        let mixture = Mixture::new(spec, format, Format::Affine(8));
        let x = Random(5).floats(50 * HIDDEN, 1.0);
        let whole = mixture.run(backend, &x, None).unwrap();
        for tokens in [0..1, 7..9, 20..50] {
            let part = tokens.start * HIDDEN..tokens.end * HIDDEN;
            let apart = mixture.run(backend, &x[part.clone()], None).unwrap();
            let same = whole[part].iter().zip(&apart).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{what}: tokens {tokens:?}");
        }
    }
}

/// The comparison tells what is wrong.
#[test]
fn what_is_wrong_is_noticed() {
    let (_, gpt_oss) = routers().into_iter().find(|(name, _)| *name == "gpt_oss").unwrap();
    let good = Mixture::new(gpt_oss, Format::Affine(4), Format::Affine(8));
    type Change = fn(&mut Mixture);
    let wrong: [(&str, Change); 5] = [
        ("the router's bias", |m| m.router_bias.fill(0.0)),
        ("biases of experts", |m| m.stacks[2].1.fill(0.0)),
        ("the next expert", |m| m.stacks[1].0.rotate_left(INNER * HIDDEN)),
        ("the activation", |m| m.spec.activation = ExpertActivation::SwiGlu),
        ("one expert less", |m| m.spec.per_token = 2),
    ];
    for backend in backends() {
        for tokens in TOKENS {
            let x = Random(6).floats(tokens * HIDDEN, 1.0);
            let found = good.run(&backend, &x, None).unwrap();
            for (what, change) in wrong {
                let mut bad = good.clone();
                change(&mut bad);
                let error = difference(&found, &bad.reference(&x, &x));
                assert!(error > 1e-2, "{what} makes a difference of only {error:e}");
            }
        }
    }
}

mod layouts;
