//! Models and steps for the other checks.

use std::path::Path;

use mlx_rs::{Array, Dtype};
use omlx::cache::Pages;
use omlx::config::ModelConfig;
use omlx::engine::{Packed, Run, StepInput, StepPlan};
use omlx::error::{Error, Result};
use omlx::kernels::{Backend, Gpu};
use omlx::models::{self, Model};
use omlx::nn::Step;
use omlx::weights::Weights;
use serde_json::{Value, json};

pub const BLOCK_TOKENS: usize = 32;

/// Numbers from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        (1..items.len()).rev().for_each(|i| items.swap(i, self.below(i + 1)));
    }
}

/// A small model of random weights: 4 layers, `head_dim` wide heads.
pub fn small(model_type: &str, head_dim: usize, change: Value) -> Result<ModelConfig> {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1024,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": head_dim, "vocab_size": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40_960, "tie_word_embeddings": true,
    });
    if let (Some(config), Value::Object(change)) = (config.as_object_mut(), change) {
        config.extend(change);
    }
    ModelConfig::from_value(config)
}

/// Where a model comes from.
pub enum Source<'a> {
    Folder(&'a Path),
    Random(&'a ModelConfig),
}

/// How steps are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By MLX's operations, without spare rows.
    Plain,
    /// By MLX's operations, with the rows in buckets, as where the kernels do not work.
    Buckets,
    /// By the kernels.
    Kernels,
}

/// A model with its pools.
pub struct Loaded {
    pub model: Box<dyn Model>,
    pub pages: Pages,
    pub vocab: usize,
    in_buckets: bool,
}

impl Loaded {
    /// With `blocks` blocks.
    pub fn new(source: &Source<'_>, dtype: Dtype, blocks: usize, way: Way) -> Result<Self> {
        let dtype = Some(dtype);
        let (config, weights) = match source {
            Source::Folder(folder) => {
                let config = ModelConfig::load(folder)?;
                let weights = Weights::open(folder, &config, dtype)?;
                (config, weights)
            }
            Source::Random(config) => ((*config).clone(), Weights::random(config, dtype)),
        };
        let backend = if way == Way::Kernels { Backend::Gpu(Gpu::new(BLOCK_TOKENS)) } else { Backend::Mlx };
        let context = models::context_length(&config, None)?;
        let model = models::load(&config, context, weights.computed_by(backend.clone()))?.model;
        let mut pages = Pages::new(backend, model.kv_layout(), BLOCK_TOKENS)?;
        pages.resize(&vec![blocks; pages.capacities().len()]);
        pages.resize_all()?;
        Ok(Self { model, pages, vocab: models::vocab_size(&config)?, in_buckets: way != Way::Plain })
    }

    /// The step's graph: hidden states of all rows `[T, hidden]`, the first row of each run, and what else must be
    /// evaluated.
    pub fn step(&mut self, plan: &StepPlan) -> Result<(Array, Vec<usize>, Vec<Array>)> {
        let groups = self.pages.capacities().len();
        let of = |run: &Run| Run { tables: run.tables.iter().cycle().take(groups).cloned().collect(), ..run.clone() };
        let runs: Vec<Run> = plan.runs.iter().map(of).collect();
        let packed = Packed::new(&runs, &plan.copies, BLOCK_TOKENS, self.in_buckets);
        let mut ids = vec![0u32; packed.shape.rows];
        for (run, &first) in plan.runs.iter().zip(&packed.shape.first) {
            let StepInput::Known(tokens) = &run.input else { return Err(Error::internal("an unread token")) };
            ids[first..first + tokens.len()].copy_from_slice(tokens);
        }
        let (ids, positions) = (Array::from_slice(&ids, &[ids.len() as i32]), packed.positions()?);
        let Packed { shape, placements } = packed;
        let mut step = Step::new(&positions, &mut self.pages, &placements);
        let hidden = self.model.hidden(&ids, &mut step)?;
        Ok((hidden, shape.first, step.unread))
    }
}

impl Loaded {
    /// Logits of all rows of a step's runs, one run after the other.
    pub fn logits(&mut self, plan: &StepPlan) -> Result<Vec<f32>> {
        let (hidden, firsts, unread) = self.step(plan)?;
        mlx_rs::transforms::eval(&unread)?;
        let runs = plan.runs.iter().zip(&firsts);
        let rows: Vec<i32> = runs.flat_map(|(run, &first)| first as i32..(first + run.tokens()) as i32).collect();
        host(&self.model.logits(&hidden, Some(&Array::from_slice(&rows, &[rows.len() as i32])))?)
    }
}

/// A run of `tokens` from `start` on, in these blocks.
pub fn run(sequence: u64, start: usize, tokens: &[u32], blocks: &[u32]) -> Run {
    Run {
        sequence,
        input: StepInput::Known(tokens.to_vec()),
        start,
        samples: true,
        tables: vec![blocks.iter().map(|&block| Some(block)).collect()],
        state: None,
    }
}

pub fn host(array: &Array) -> Result<Vec<f32>> {
    let array = array.as_dtype(Dtype::Float32)?.contiguous()?;
    Ok(array.try_as_slice::<f32>().map_err(|error| Error::internal(error.to_string()))?.to_vec())
}

/// The next step of sequences of which `computed` tokens are there, in blocks of `tables`: pieces of some of them, of random lengths.
/// No runs when all are computed.
pub fn random_step(
    random: &mut Random,
    sequences: &[Vec<u32>],
    computed: &mut [usize],
    tables: &[Vec<u32>],
) -> StepPlan {
    let mut picked: Vec<usize> = (0..sequences.len()).filter(|&at| computed[at] < sequences[at].len()).collect();
    if picked.is_empty() {
        return StepPlan::default();
    }
    random.shuffle(&mut picked);
    picked.truncate(1 + random.below(picked.len()));
    let mut runs = Vec::new();
    let kind = random.below(3);
    for &at in &picked {
        let left = sequences[at].len() - computed[at];
        // Steps of single tokens only, of pieces, and mixed ones.
        let tokens = match (kind, random.below(2)) {
            (0, _) | (1, 0) => 1,
            (1, _) => left.min(1 + random.below(30)),
            _ => left.min(1 + random.below(400)),
        };
        let (start, end) = (computed[at], computed[at] + tokens);
        runs.push(run(at as u64, start, &sequences[at][start..end], &tables[at]));
        computed[at] = end;
    }
    // As the scheduler does it: single tokens first.
    runs.sort_by_key(|run| run.tokens() > 1);
    StepPlan { runs, ..StepPlan::default() }
}
