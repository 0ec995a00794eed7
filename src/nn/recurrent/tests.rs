//! The layers against mlx-lm's own (`tests/fixtures/make_recurrent.py`), and in random company, cuts and slots.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as FileDtype, TensorView};
use serde_json::{Value, json};

use super::compose::ChunksFrom;
use super::*;
use crate::config::ModelConfig;
use crate::kernels::{Cpu, Precision, StatePlacement, StateRun};
use crate::mlx::{self, Device};
use crate::nn::{Linear, RmsNorm};

/// Between layers in f32: the largest difference over the largest number.
const TOLERANCE: f32 = 2e-5;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A layer as the fixtures have it.
struct Case {
    name: &'static str,
    config: Value,
    tensors: Tensors,
}

const CASES: [&str; 6] = ["qwen3_next", "qwen3_5", "nemotron_h", "granitemoehybrid", "lfm2", "lfm2_plain"];

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Kernels,
    OneByOne,
    Chunks,
}

impl Case {
    fn all() -> Vec<Case> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/recurrent.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let case = |name: &'static str| {
            let config = serde_json::from_str(&metadata.metadata().as_ref().unwrap()[name]).unwrap();
            let own = file.tensors().into_iter().filter_map(|(key, view)| {
                let key = key.strip_prefix(name)?.strip_prefix('.')?.to_owned();
                let numbers = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                Some((key, (view.shape().to_vec(), numbers)))
            });
            Case { name, config, tensors: own.collect() }
        };
        CASES.map(case).into()
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    fn number(&self, key: &str) -> f32 {
        self.config[key].as_f64().unwrap_or_else(|| panic!("{key}")) as f32
    }

    fn rows(&self) -> usize {
        self.tensors["x"].0[0]
    }

    fn array(&self, key: &str) -> Array {
        let (shape, numbers) = &self.tensors[key];
        Array::from_slice(numbers, &shape.iter().map(|&n| n as i32).collect::<Vec<_>>())
    }

    /// Parameters as a checkpoint would have them.
    fn checkpoint(&self, change: impl Fn(&mut Tensors)) -> tempfile::TempDir {
        let mut tensors: Tensors = self
            .tensors
            .iter()
            .filter_map(|(key, tensor)| Some((format!("m.{}", key.strip_prefix("layer.")?), tensor.clone())))
            .collect();
        tensors.insert("n.weight".into(), self.tensors["norm"].clone());
        change(&mut tensors);
        let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let data: Vec<_> = tensors.into_iter().map(|(key, (shape, x))| (key, shape, bytes(&x))).collect();
        let views =
            data.iter().map(|(key, shape, x)| (key, TensorView::new(FileDtype::F32, shape.clone(), x).unwrap()));
        let folder = tempfile::tempdir().unwrap();
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        folder
    }

    fn load(&self, side: Side, change: impl Fn(&mut Tensors)) -> Result<(RecurrentLayer, RmsNorm)> {
        let config = ModelConfig::from_value(json!({"model_type": self.name}))?;
        let folder = self.checkpoint(change);
        let backend = match side {
            Side::Kernels => Backend::Cpu(Cpu::new(Some(2), Precision::Exact)),
            Side::OneByOne | Side::Chunks => Backend::Mlx,
        };
        let mut weights = Weights::open(folder.path(), &config, None)?.computed_by(backend);
        let hidden = self.size("hidden_size");
        let norm = RmsNorm::load(&mut weights, "n", hidden, 1e-6)?;
        let spec = match self.name {
            "qwen3_next" | "qwen3_5" => RecurrentSpec::DeltaNet(self.delta()),
            "nemotron_h" | "granitemoehybrid" => RecurrentSpec::Mamba2(self.mamba()),
            _ => {
                let bias = self.config["conv_bias"].as_bool().unwrap();
                RecurrentSpec::ShortConv(ShortConvSpec { hidden, taps: self.size("conv_L_cache"), bias })
            }
        };
        let mut layer = spec.load(&mut weights, "m")?;
        // What is planned is what there is, where numbers are f32.
        assert_eq!(spec.state_bytes(), layer.state_layout().slot_bytes(), "{}", self.name);
        if let Inner::Recurrent(inner) = &mut layer.inner {
            inner.chunks = ChunksFrom(if side == Side::Chunks { 2 } else { usize::MAX });
        }
        weights.finish()?;
        Ok((layer, norm))
    }

    fn delta(&self) -> DeltaNetSpec {
        DeltaNetSpec {
            hidden: self.size("hidden_size"),
            key_heads: self.size("linear_num_key_heads"),
            value_heads: self.size("linear_num_value_heads"),
            key_width: self.size("linear_key_head_dim"),
            value_width: self.size("linear_value_head_dim"),
            taps: self.size("linear_conv_kernel_dim"),
            norm_eps: self.number("rms_norm_eps"),
            projections: match self.name {
                "qwen3_next" => DeltaProjections::Interleaved,
                _ => DeltaProjections::Separate,
            },
        }
    }

    fn mamba(&self) -> Mamba2Spec {
        let nemotron = self.name == "nemotron_h";
        let key = |nemotron_key: &'static str, granite_key| if nemotron { nemotron_key } else { granite_key };
        let groups = self.size(key("n_groups", "mamba_n_groups"));
        let limit = |at: usize| self.config["time_step_limit"][at].as_f64().unwrap() as f32;
        let flag = |key: &str| self.config[key].as_bool().unwrap();
        Mamba2Spec {
            hidden: self.size("hidden_size"),
            heads: self.size(key("mamba_num_heads", "mamba_n_heads")),
            head_width: self.size(key("mamba_head_dim", "mamba_d_head")),
            state_width: self.size(key("ssm_state_size", "mamba_d_state")),
            groups,
            taps: self.size(key("conv_kernel", "mamba_d_conv")),
            step_limits: (limit(0), limit(1)),
            projection_bias: flag("mamba_proj_bias"),
            convolution_bias: flag(key("use_conv_bias", "mamba_conv_bias")),
            norm_groups: if nemotron { groups } else { 1 },
            norm_eps: self.number(key("layer_norm_epsilon", "rms_norm_eps")),
        }
    }
}

impl RecurrentLayer {
    fn backend(&self) -> &Backend {
        match &self.inner {
            Inner::Recurrent(inner) => &inner.backend,
            Inner::Convolution(inner) => &inner.backend,
        }
    }
}

/// Slots copied before, and rows of the case for slots: slot, first row, end.
#[derive(Debug, Clone, Default)]
struct Play {
    copies: Vec<(u32, u32)>,
    runs: Vec<(u32, usize, usize)>,
    /// Rows of nobody's behind the first run.
    spare: usize,
}

fn steps(all: &[&[(u32, usize, usize)]]) -> Vec<Play> {
    all.iter().map(|runs| Play { runs: runs.to_vec(), ..Play::default() }).collect()
}

/// A layer with states, and what each slot's rows gave.
struct Stage<'a> {
    case: &'a Case,
    layer: RecurrentLayer,
    norm: RmsNorm,
    pools: StatePools,
    out: BTreeMap<u32, Vec<f32>>,
}

impl<'a> Stage<'a> {
    fn new(case: &'a Case, side: Side) -> Result<Self> {
        let (layer, norm) = case.load(side, |_| ())?;
        let pools = StatePools::new(layer.backend().clone(), layer.state_layout(), 5)?;
        Ok(Self { case, layer, norm, pools, out: BTreeMap::new() })
    }

    fn play(mut self, steps: &[Play]) -> Result<Self> {
        let x = self.case.array("x");
        let hidden = x.dim(1);
        for step in steps {
            let (mut rows, mut runs, mut at) = (Vec::new(), Vec::new(), 0);
            for &(slot, from, to) in &step.runs {
                rows.push(mlx::rows(&x, from, to)?);
                runs.push(StateRun { rows: at..at + to - from, slot, begins: from == 0 });
                at += to - from;
                if step.spare > 0 && runs.len() == 1 {
                    rows.push(Array::full::<f32>(&[step.spare as i32, hidden], Array::from_f32(1.0))?);
                    at += step.spare;
                }
            }
            let placement = Arc::new(StatePlacement { copies: step.copies.clone(), runs: runs.clone() });
            let mut index = StateIndex::new(&placement);
            let joined = mlx_rs::ops::concatenate(&rows, 0)?;
            let out = self.layer.forward(&joined, Some(&self.norm), None, (&mut self.pools, &mut index))?;
            mlx_rs::transforms::eval([&out].into_iter().chain(self.pools.arrays()))?;
            crate::kernels::check()?;
            for run in runs {
                let given = mlx::rows(&out, run.rows.start, run.rows.end)?.contiguous()?;
                given.eval()?;
                self.out.entry(run.slot).or_default().extend(given.as_slice::<f32>());
            }
        }
        Ok(self)
    }

    /// What the pools hold of a slot, convolution first.
    fn slot(&self, slot: usize) -> Result<Vec<Vec<f32>>> {
        let one = |pool: &Array| -> Result<Vec<f32>> {
            let own = mlx::rows(pool, slot, slot + 1)?.contiguous()?;
            own.eval()?;
            Ok(own.as_slice::<f32>().to_vec())
        };
        self.pools.arrays().map(one).collect()
    }
}

/// The largest difference over the largest number.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let far = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, |most, x| if x.is_nan() { f32::INFINITY } else { most.max(x) });
    far / most
}

fn on_cpu(body: impl FnOnce() -> Result<()>) {
    mlx::init().unwrap();
    mlx::on_device(Device::Cpu, body).unwrap();
}

const SIDES: [Side; 3] = [Side::Kernels, Side::OneByOne, Side::Chunks];

#[test]
fn layers_are_mlx_lms() {
    on_cpu(|| {
        for case in &Case::all() {
            for side in SIDES {
                let stage = Stage::new(case, side)?.play(&steps(&[&[(3, 0, case.rows())]]))?;
                let off = distance(&stage.out[&3], &case.tensors["out"].1);
                assert!(off < TOLERANCE, "{} {side:?}: {off:e}", case.name);
                let kept: Vec<_> = ["kept", "state"].iter().filter_map(|key| case.tensors.get(*key)).collect();
                let found = stage.slot(3)?;
                assert_eq!(found.len(), kept.len());
                for (found, (_, expected)) in found.iter().zip(kept) {
                    let off = distance(found, expected);
                    assert!(off < TOLERANCE, "{} {side:?}, state: {off:e}", case.name);
                }
                println!("{} {side:?}: {off:e}", case.name);
            }
        }
        Ok(())
    });
}

#[test]
fn cuts_company_and_slots_change_nothing() {
    on_cpu(|| {
        for case in &Case::all() {
            for side in SIDES {
                let whole = Stage::new(case, side)?.play(&steps(&[&[(0, 0, 120)]]))?;
                let whole = &whole.out[&0];
                let width = whole.len() / 120;
                // Three sequences of different lengths: pieces, single rows side by side, one that comes late.
                let pieces: &[&[(u32, usize, usize)]] = &[
                    &[(4, 0, 1), (1, 0, 70)],
                    &[(4, 1, 2), (1, 70, 71), (2, 0, 65)],
                    &[(1, 71, 72), (4, 2, 3), (2, 65, 66)],
                    &[(2, 66, 67), (4, 3, 100), (1, 72, 110)],
                    &[(2, 67, 120), (1, 110, 120)],
                ];
                let mut steps = steps(pieces);
                if side != Side::Kernels {
                    steps[3].spare = 2;
                }
                let stage = Stage::new(case, side)?.play(&steps)?;
                for (slot, rows) in [(1, 120), (2, 120), (4, 100)] {
                    let (found, expected) = (&stage.out[&slot], &whole[..rows * width]);
                    if side == Side::Kernels {
                        assert!(same(found, expected), "{}: slot {slot}", case.name);
                    } else {
                        let off = distance(found, expected);
                        assert!(off < TOLERANCE, "{} {side:?}, slot {slot}: {off:e}", case.name);
                    }
                }
                // Nobody has written to the others since they were made.
                if side != Side::Kernels {
                    assert!(stage.slot(3)?.iter().flatten().all(|&x| x == 0.0), "{} {side:?}", case.name);
                }
            }
        }
        Ok(())
    });
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn copied_states_go_on_alike() {
    on_cpu(|| {
        for case in &Case::all() {
            for side in SIDES {
                // A snapshot in slot 2; the sequence goes on, another one begins with the snapshot, and two slots are
                // exchanged.
                let plan = |copied: bool| {
                    let mut all = steps(&[
                        &[(0, 0, 50)],
                        &[(0, 50, 60), (3, 0, 20)],
                        &[(1, 50, 60)],
                        &[(3, 60, 75), (0, 20, 35)],
                    ]);
                    all[1].copies = if copied { vec![(0, 2)] } else { vec![] };
                    all[2].copies = vec![(2, 1)];
                    all[3].copies = vec![(0, 3), (3, 0)];
                    all
                };
                let stage = Stage::new(case, side)?;
                let addresses = |pools: &StatePools| -> Vec<_> {
                    pools.arrays().map(|array| array.as_slice::<f32>().as_ptr()).collect()
                };
                let before = addresses(&stage.pools);
                let stage = stage.play(&plan(true))?;
                if side == Side::Kernels {
                    assert_eq!(addresses(&stage.pools), before, "{}: written in place", case.name);
                }
                let width = stage.out[&0].len() / 75;
                let (original, fork) = (&stage.out[&0][50 * width..60 * width], &stage.out[&1]);
                let is_same = |a: &[f32], b: &[f32]| match side {
                    Side::Kernels => same(a, b),
                    Side::OneByOne | Side::Chunks => distance(a, b) < TOLERANCE,
                };
                assert!(is_same(fork, original), "{} {side:?}", case.name);
                let whole = Stage::new(case, side)?.play(&steps(&[&[(0, 0, 75)]]))?;
                let whole = &whole.out[&0];
                assert!(
                    is_same(&stage.out[&3][20 * width..], &whole[60 * width..75 * width]),
                    "{} {side:?}",
                    case.name
                );
                assert!(
                    is_same(&stage.out[&0][60 * width..], &whole[20 * width..35 * width]),
                    "{} {side:?}",
                    case.name
                );
                // Without the copy the fork is another one.
                if side != Side::Kernels {
                    let other = Stage::new(case, side)?.play(&plan(false))?;
                    assert!(!is_same(&other.out[&1], original), "{} {side:?}", case.name);
                }
            }
        }
        Ok(())
    });
}

#[test]
fn pools_grow_and_shrink() {
    on_cpu(|| {
        for case in &Case::all() {
            for side in [Side::Kernels, Side::OneByOne] {
                let mut stage = Stage::new(case, side)?.play(&steps(&[&[(1, 0, 30)]]))?;
                let (before, bytes) = (stage.slot(1)?, stage.layer.state_layout().slot_bytes());
                assert_eq!(stage.pools.bytes(), 5 * bytes);
                stage.pools.resize(9)?;
                assert_eq!((stage.pools.slots(), stage.pools.bytes()), (9, 9 * bytes));
                stage.pools.resize(2)?;
                assert_eq!((stage.slot(1)?, stage.pools.bytes()), (before, 2 * bytes), "{} {side:?}", case.name);
                let placement = Arc::new(StatePlacement { copies: vec![(1, 0)], runs: Vec::new() });
                let done = stage.pools.copy(&placement)?;
                mlx_rs::transforms::eval(stage.pools.arrays().chain(&done))?;
                assert_eq!(stage.slot(0)?, stage.slot(1)?, "{} {side:?}", case.name);
                let after = stage.play(&steps(&[&[(0, 30, 40)]]))?;
                let whole = Stage::new(case, side)?.play(&steps(&[&[(0, 0, 40)]]))?;
                let width = whole.out[&0].len() / 40;
                let off = distance(&after.out[&0], &whole.out[&0][30 * width..]);
                assert!(off < TOLERANCE, "{} {side:?}: {off:e}", case.name);
            }
        }
        Ok(())
    });
}

#[test]
fn norms_and_residuals_are_the_callers_choice() {
    on_cpu(|| {
        for case in &Case::all() {
            for side in [Side::Kernels, Side::OneByOne] {
                let (layer, norm) = case.load(side, |_| ())?;
                let run = StateRun { rows: 0..case.rows(), slot: 0, begins: true };
                let placement = Arc::new(StatePlacement { copies: Vec::new(), runs: vec![run] });
                let x = case.array("x");
                let forward = |x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>| -> Result<Array> {
                    let mut pools = StatePools::new(layer.backend().clone(), layer.state_layout(), 1)?;
                    let mut index = StateIndex::new(&placement);
                    let out = layer.forward(x, norm, residual, (&mut pools, &mut index))?;
                    out.eval()?;
                    Ok(out)
                };
                let expected = forward(&x, Some(&norm), None)?.add(&x)?;
                let found = [forward(&x, Some(&norm), Some(&x))?, forward(&norm.forward(&x)?, None, Some(&x))?];
                expected.eval()?;
                for found in found {
                    assert!(distance(found.as_slice(), expected.as_slice()) < 1e-6, "{} {side:?}", case.name);
                }
            }
        }
        Ok(())
    });
}

#[test]
fn hugging_faces_convolutions_load_and_others_do_not() {
    on_cpu(|| {
        for case in &Case::all() {
            let name = if case.name.starts_with("lfm2") { "m.conv.weight" } else { "m.conv1d.weight" };
            let shaped = |shape: &'static [usize]| {
                move |tensors: &mut Tensors| {
                    let own = &mut tensors.get_mut(name).unwrap().0;
                    *own = shape.iter().map(|&axis| own[axis]).collect();
                }
            };
            let plays = |change: &dyn Fn(&mut Tensors)| -> Result<Vec<f32>> {
                let (layer, norm) = case.load(Side::Kernels, change)?;
                let pools = StatePools::new(layer.backend().clone(), layer.state_layout(), 5)?;
                let stage = Stage { case, layer, norm, pools, out: BTreeMap::new() };
                Ok(stage.play(&steps(&[&[(0, 0, 20)]]))?.out[&0].clone())
            };
            let theirs = shaped(&[0, 2, 1]);
            assert!(same(&plays(&theirs)?, &plays(&|_| ())?), "{}", case.name);
            let wrong = shaped(&[1, 0, 2]);
            let error = plays(&wrong).unwrap_err();
            assert!(error.message().contains(name), "{error}");
        }
        Ok(())
    });
}

/// Quantised outputs in another order are those of the layer, in that order.
#[test]
fn quantised_projections_are_reordered() {
    on_cpu(|| {
        let (input, output) = (64, 12);
        let weight = mlx_rs::random::normal::<f32>(&[output, input], None, None, Some(&mlx_rs::random::key(3)?))?;
        let (packed, scales, biases) = mlx_rs::ops::quantize(&weight, 32, 4)?;
        mlx_rs::transforms::eval([&packed, &scales, &biases])?;
        let folder = tempfile::tempdir().unwrap();
        let words: Vec<u8> = packed.as_slice::<u32>().iter().flat_map(|x| x.to_le_bytes()).collect();
        let floats = |x: &Array| x.as_slice::<f32>().iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (scales, biases) = (floats(&scales), floats(&biases));
        let view = |dtype, columns, data| TensorView::new(dtype, vec![output as usize, columns], data).unwrap();
        let views = [
            ("m.weight", view(FileDtype::U32, 8, &words)),
            ("m.scales", view(FileDtype::F32, 2, &scales)),
            ("m.biases", view(FileDtype::F32, 2, &biases)),
        ];
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        let config = json!({"model_type": "m", "quantization": {"group_size": 32, "bits": 4}});
        let config = ModelConfig::from_value(config)?;
        let load = || Linear::load(&mut Weights::open(folder.path(), &config, None)?, "m", 64, output as usize, false);
        let order: Vec<i32> = (0..output).map(|i| (i * 5 + 3) % output).collect();
        let x = mlx_rs::random::normal::<f32>(&[3, input], None, None, Some(&mlx_rs::random::key(4)?))?;
        let plain = load()?.forward(&x)?;
        let expected = plain.take_axis(Array::from_slice(&order, &[output]), 1)?.contiguous()?;
        let found = load()?.reordered(&order)?.forward(&x)?;
        mlx_rs::transforms::eval([&plain, &expected, &found])?;
        assert_eq!(found.as_slice::<f32>(), expected.as_slice::<f32>());
        assert_ne!(found.as_slice::<f32>(), plain.as_slice::<f32>());
        assert_eq!(found.dtype(), Dtype::Float32);
        Ok(())
    });
}
