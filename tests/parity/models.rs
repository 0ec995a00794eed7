//! Logits, hidden states and greedy tokens of every architecture against mlx-lm (or transformers, where the fixture
//! says so), in f32: computed by MLX's operations, as on a GPU, and by the CPU kernels in exact mode. The fixtures and
//! their makers are in `tests/fixtures`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use mlx_rs::{Array, Dtype};
use std::sync::Arc;

use omlx::cache::Pages;
use omlx::config::ModelConfig;
use omlx::error::Result;
use omlx::kernels::{Backend, Cpu, Placement, Precision, Segment, StatePlacement, StateRun};
use omlx::mlx::{self, Device};
use omlx::models::{self, Model};
use omlx::nn::{StatePools, Step};
use omlx::weights::Weights;
use safetensors::SafeTensors;

/// Largest error over the largest reference value.
const TOLERANCE: f32 = 1e-4;

/// Small blocks, so that every fixture has several; their number and 5 have no common divisor.
const BLOCK_TOKENS: usize = 16;
const BLOCKS: usize = 32;

/// Slots for states, of which the last one is used.
const STATES: usize = 3;

/// The types that have an 8-bit fixture too: the kernels are the same for all others.
const EIGHT_BIT: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

pub(super) struct Expected {
    pub ints: HashMap<String, Vec<u32>>,
    pub floats: HashMap<String, Vec<f32>>,
}

impl Expected {
    pub fn load(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut expected = Expected { ints: HashMap::new(), floats: HashMap::new() };
        for (name, view) in tensors.tensors() {
            let words = view.data().chunks_exact(4).map(|word| <[u8; 4]>::try_from(word).unwrap());
            match view.dtype() {
                safetensors::Dtype::I32 => {
                    expected.ints.insert(name, words.map(u32::from_le_bytes).collect());
                }
                safetensors::Dtype::F32 => {
                    expected.floats.insert(name, words.map(f32::from_le_bytes).collect());
                }
                other => panic!("{name} has type {other:?}"),
            }
        }
        expected
    }
}

/// `max |a - b| / max |b|`; infinite for values that are not numbers or lengths that differ.
pub(super) fn normalised_error(actual: &[f32], expected: &[f32]) -> f32 {
    if actual.len() != expected.len() || actual.iter().any(|v| !v.is_finite()) {
        return f32::INFINITY;
    }
    let difference = actual.iter().zip(expected).map(|(a, e)| (a - e).abs()).fold(0.0, f32::max);
    difference / expected.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()))
}

pub(super) fn host(array: &Array) -> Vec<f32> {
    array.contiguous().unwrap().as_slice::<f32>().to_vec()
}

fn argmax(row: &[f32]) -> u32 {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32
}

struct Run {
    model: Box<dyn Model>,
    pages: Pages,
    states: Vec<StatePools>,
    /// Tokens so far.
    len: usize,
}

impl Run {
    fn open(folder: &Path, context: Option<usize>, backend: &Backend) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let context = models::context_length(&config, context)?;
        let weights = Weights::open(folder, &config, Some(Dtype::Float32))?.computed_by(backend.clone());
        let model = models::load(&config, context, weights)?.model;
        let mut pages = Pages::new(backend.clone(), model.kv_layout(), BLOCK_TOKENS)?;
        pages.resize(&vec![BLOCKS; pages.capacities().len()]);
        pages.resize_all()?;
        let states = model.state_layouts();
        let states =
            states.iter().map(|layout| StatePools::new(backend.clone(), layout, STATES)).collect::<Result<_>>()?;
        Ok(Self { model, pages, states, len: 0 })
    }

    /// Logits of all `tokens`, which continue the sequence.
    fn logits(&mut self, tokens: &[u32], trace: Option<&mut Vec<Array>>) -> Vec<f32> {
        let (start, end) = (self.len, self.len + tokens.len());
        let positions: Vec<i32> = (start as i32..end as i32).collect();
        let ids = Array::from_slice(tokens, &[tokens.len() as i32]);
        let positions = Array::from_slice(&positions, &[tokens.len() as i32]);
        // Blocks in no particular order.
        let tables: Vec<u32> = (0..end.div_ceil(BLOCK_TOKENS)).map(|i| 1 + (i * 5 % BLOCKS) as u32).collect();
        let slot = |at: usize| tables[at / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (at % BLOCK_TOKENS) as u32;
        let slots = (start..end).map(slot).collect();
        let segments = vec![Segment { rows: 0..tokens.len(), start, table: 0 }];
        let placement = Arc::new(Placement { tables, slots, segments, ..Placement::default() });
        let placements = vec![placement; self.pages.capacities().len()];
        let state = StateRun { rows: 0..tokens.len(), slot: STATES as u32 - 1, begins: start == 0 };
        let states = Arc::new(StatePlacement { copies: Vec::new(), runs: vec![state] });
        let step = Step::new(&positions, &mut self.pages, &placements);
        let mut step = step.with_states(&mut self.states, &states);
        step.trace = trace;
        let hidden = self.model.hidden(&ids, &mut step).unwrap();
        self.len = end;
        host(&self.model.logits(&hidden, None).unwrap())
    }
}

/// Everything that the fixture in `folder` holds; returns the largest error seen.
pub(super) fn check(folder: &Path, backend: &Backend) -> f32 {
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let expected = Expected::load(folder);
    // The factors of LongRoPE follow the context that is served; this fixture is one that needs no stretching.
    let context = (name == "llama-rope-longrope-short").then_some(64);
    let mut run = Run::open(folder, context, backend).unwrap_or_else(|e| panic!("{name}: {e}"));
    let prompt = &expected.ints["prompt"];
    let mut trace = Vec::new();
    let logits = run.logits(prompt, Some(&mut trace));
    let vocab = logits.len() / prompt.len();
    let mut worst = normalised_error(&logits, &expected.floats["logits"]);
    assert!(worst <= TOLERANCE, "{name}: logits differ by {worst}");
    for (layer, hidden) in trace.iter().enumerate() {
        let error = normalised_error(&host(hidden), &expected.floats[&format!("hidden.{layer}")]);
        assert!(error <= TOLERANCE, "{name}: hidden states after layer {layer} differ by {error}");
        worst = worst.max(error);
    }
    assert!(!expected.floats.contains_key(&format!("hidden.{}", trace.len())), "{name}: a layer is missing");

    let mut token = argmax(&logits[logits.len() - vocab..]);
    let mut greedy = Vec::new();
    let mut decoded = Vec::new();
    for _ in 0..expected.ints["greedy"].len() {
        greedy.push(token);
        let row = run.logits(&[token], None);
        token = argmax(&row);
        decoded.extend(row);
    }
    assert_eq!(greedy, expected.ints["greedy"], "{name}: greedy tokens differ");
    let error = normalised_error(&decoded, &expected.floats["decode_logits"]);
    assert!(error <= TOLERANCE, "{name}: logits of decode steps differ by {error}");

    // A prompt in chunks is the same prompt.
    let mut chunked = Run::open(folder, context, backend).unwrap();
    let parts: Vec<f32> = prompt.chunks(7).flat_map(|part| chunked.logits(part, None)).collect();
    let error = normalised_error(&parts, &expected.floats["logits"]);
    assert!(error <= TOLERANCE, "{name}: logits of a chunked prompt differ by {error}");
    if matches!(backend, Backend::Cpu(_)) && !name.contains("mxfp8") {
        // There is no kernel for mxfp8: MLX computes it.
        let same = parts.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{name}: exact mode gives other bits for a chunked prompt");
    }
    worst.max(error)
}

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let mut folders: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

fn is_supported(folder: &Path) -> bool {
    ModelConfig::load(folder).and_then(|config| models::check_supported(&config)).is_ok()
}

pub(super) fn backends() -> [Backend; 2] {
    [Backend::Mlx, Backend::Cpu(Cpu::new(Some(2), Precision::Exact))]
}

pub(super) fn on_cpu(body: impl FnOnce()) {
    mlx::init().unwrap();
    mlx::on_device(Device::Cpu, || {
        body();
        Ok(())
    })
    .unwrap();
}

#[test]
fn every_fixture_matches_its_reference() {
    let folders: Vec<_> = fixtures().into_iter().filter(|folder| is_supported(folder)).collect();
    for architecture in models::supported_types() {
        let formats =
            if EIGHT_BIT.contains(&architecture) { &["f32", "4bit", "8bit"][..] } else { &["f32", "4bit"][..] };
        for format in formats {
            let name = format!("{architecture}-{format}");
            assert!(folders.iter().any(|f| f.ends_with(&name)), "there is no fixture {name}");
        }
    }
    on_cpu(|| {
        for backend in backends() {
            for folder in &folders {
                let worst = check(folder, &backend);
                println!(
                    "{} {}: {worst:.1e}",
                    if matches!(backend, Backend::Mlx) { "MLX" } else { "CPU" },
                    folder.file_name().unwrap().to_string_lossy()
                );
            }
        }
    });
}

#[test]
fn every_fixture_is_loaded() {
    let unknown: Vec<_> = fixtures().into_iter().filter(|folder| !is_supported(folder)).collect();
    assert!(unknown.is_empty(), "no type is declared for {unknown:?}");
}

/// `OMLX_BLESS=1 cargo test --test parity readme` writes it.
#[test]
fn the_readme_lists_the_registry() {
    const HEAD: &str = "| `model_type` | what |\n|---|---|\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let start = readme.find(HEAD).expect("a table of model types") + HEAD.len();
    let end = start + readme[start..].find("\n\n").unwrap() + 1;
    let rows = models::supported_models().map(|(model_type, models)| format!("| `{model_type}` | {models} |\n"));
    let rows: String = rows.collect();
    if std::env::var_os("OMLX_BLESS").is_some() {
        std::fs::write(path, format!("{}{rows}{}", &readme[..start], &readme[end..])).unwrap();
        return;
    }
    assert!(readme[start..end] == rows, "README.md does not list the model types as they are registered");
}

#[test]
fn a_wrong_model_fails_the_comparison() {
    on_cpu(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
        let expected = Expected::load(&root.join("llama-rope-yarn"));
        for backend in backends() {
            let mut other = Run::open(&root.join("llama-rope-linear"), None, &backend).unwrap();
            let logits = other.logits(&expected.ints["prompt"], None);
            assert!(normalised_error(&logits, &expected.floats["logits"]) > 100.0 * TOLERANCE);
        }
        let mut shifted = expected.floats["logits"].clone();
        shifted[17] += 2.0 * TOLERANCE * shifted.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        assert!(normalised_error(&shifted, &expected.floats["logits"]) > TOLERANCE);
    });
}
