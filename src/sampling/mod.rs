//! Choosing the next token, on MLX arrays, for all rows of a step in one graph: by one kernel on the CPU, composed of MLX's
//! operations elsewhere. The two draw different tokens for the same seed.
//!
//! Order of operations, as in Hugging Face and vLLM: logit bias and penalties, tokens that are not allowed, temperature, then the
//! filters (top-k, top-p, min-p) on the tempered distribution. Noise depends on a row's seed and the number of tokens it has drawn,
//! and belongs to token ids: what else is in the batch does not change what a row draws.

mod params;

pub use params::SamplingParams;

use mlx_rs::Array;
use mlx_rs::ops::indexing::argmax_axis;
use mlx_rs::ops::{concatenate, select};

use crate::error::Result;
use crate::kernels::{Backend, Draw};

/// The sampling state of one sequence; its arrays follow the tokens without reading them back.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    vocab: usize,
    drawn: u64,
    /// Added to the logits, `[1, vocab]`.
    bias: Option<Array>,
    /// Tokens of prompt and answer so far, `[1, vocab]` bool; with a repetition penalty only.
    seen: Option<Array>,
    /// Occurrences in the answer, `[1, vocab]` f32; with presence or frequency penalty only.
    counts: Option<Array>,
    /// The tokens that the next draw may give, `[1, vocab]` bool; all if absent.
    allowed: Option<Array>,
}

/// What a step drew; arrays that are not evaluated yet.
#[derive(Debug)]
pub struct Drawn {
    /// Token ids `[rows]`, u32.
    pub tokens: Array,
    /// Present when any row asked for log-probabilities.
    pub logprobs: Option<DrawnLogprobs>,
}

/// Log-probabilities under the model's own distribution, before bias, penalties, temperature and filters.
#[derive(Debug)]
pub struct DrawnLogprobs {
    /// Of the drawn tokens, `[rows]` f32.
    pub drawn: Array,
    /// The most likely token ids, `[rows, n]` u32, in no order; `None` when only the drawn token's is wanted.
    pub top: Option<(Array, Array)>,
}

impl Sampler {
    /// The state of a sequence that begins with `prompt`.
    pub fn new(params: SamplingParams, prompt: &[u32], vocab: usize) -> Self {
        let row = [1, vocab as i32];
        let bias = (!params.logit_bias.is_empty()).then(|| {
            let mut bias = vec![0f32; vocab];
            for &(token, value) in &params.logit_bias {
                if let Some(slot) = bias.get_mut(token as usize) {
                    *slot += value;
                }
            }
            Array::from_slice(&bias, &row)
        });
        let seen = (params.repetition_penalty != 1.0).then(|| {
            let mut seen = vec![false; vocab];
            for &token in prompt {
                if let Some(slot) = seen.get_mut(token as usize) {
                    *slot = true;
                }
            }
            Array::from_slice(&seen, &row)
        });
        let counts = params.counts_answer().then(|| Array::from_slice(&vec![0f32; vocab], &row));
        Self { params, vocab, drawn: 0, bias, seen, counts, allowed: None }
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Lets the next draw give only tokens whose bit is set in `words`, token 0 in the lowest bit of the first word.
    pub fn restrict(&mut self, words: &[u32]) {
        let bit = |token: usize| words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
        let allowed: Vec<bool> = (0..self.vocab).map(bit).collect();
        self.allowed = Some(Array::from_slice(&allowed, &[1, self.vocab as i32]));
    }

    /// Whether the row's logits are changed before it draws.
    fn adjusts(&self) -> bool {
        self.bias.is_some() || self.seen.is_some() || self.counts.is_some() || self.allowed.is_some()
    }

    /// This row's logits `[1, vocab]` with bias and penalties, and minus infinity where a token is not allowed.
    fn adjust(&self, logits: Array) -> Result<Array> {
        let mut logits = logits;
        if let Some(bias) = &self.bias {
            logits = logits.add(bias)?;
        }
        if let Some(seen) = &self.seen {
            let penalty = Array::from_f32(self.params.repetition_penalty);
            let positive = logits.gt(Array::from_f32(0.0))?;
            let penalised = select(&positive, &logits.divide(&penalty)?, &logits.multiply(&penalty)?)?;
            logits = select(seen, &penalised, &logits)?;
        }
        if let Some(counts) = &self.counts {
            let frequency = counts.multiply(Array::from_f32(self.params.frequency_penalty))?;
            let present = counts.gt(Array::from_f32(0.0))?.as_type::<f32>()?;
            let presence = present.multiply(Array::from_f32(self.params.presence_penalty))?;
            logits = logits.subtract(frequency)?.subtract(presence)?;
        }
        if let Some(allowed) = &self.allowed {
            logits = select(allowed, &logits, Array::from_f32(f32::NEG_INFINITY))?;
        }
        Ok(logits)
    }

    /// How the next token is chosen, for the CPU's kernel.
    fn next_draw(&self) -> Draw {
        let SamplingParams { temperature, top_k, top_p, min_p, seed, .. } = self.params;
        let temperature = if self.params.is_greedy() { 0.0 } else { temperature };
        Draw { temperature, top_k, top_p, min_p, seed, drawn: self.drawn }
    }

    /// Whence the noise of the next draw comes.
    fn noise_key(&self) -> u64 {
        mix(self.params.seed, self.drawn)
    }

    /// Takes note of the token `[1, 1]` that was drawn.
    fn advance(&mut self, token: &Array) -> Result<()> {
        self.drawn += 1;
        self.allowed = None;
        if self.seen.is_none() && self.counts.is_none() {
            return Ok(());
        }
        let hit = ids(self.vocab)?.as_type::<u32>()?.eq(token)?;
        self.seen = self.seen.take().map(|seen| seen.logical_or(&hit)).transpose()?;
        self.counts = self.counts.take().map(|counts| counts.add(hit.as_type::<f32>()?)).transpose()?;
        Ok(())
    }
}

/// Token ids as a row, `[1, vocab]` i32, made on the device.
fn ids(vocab: usize) -> Result<Array> {
    Ok(mlx_rs::ops::arange::<_, i32>(None, vocab as i32, None)?.expand_dims(0)?)
}

/// SplitMix64 over seed and draw number, so that neighbouring seeds give unrelated streams.
fn mix(seed: u64, drawn: u64) -> u64 {
    let mut z = seed.wrapping_add(drawn.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Draws one token per row of `logits [rows, vocab]`; `rows` holds the samplers in the same order.
pub fn sample(backend: &Backend, logits: &Array, rows: &mut [&mut Sampler]) -> Result<Drawn> {
    let raw = logits.as_type::<f32>()?;
    let adjusted = adjust_rows(&raw, rows)?;
    let tokens = match backend {
        Backend::Cpu(cpu) => cpu.sample(&adjusted, rows.iter().map(|row| row.next_draw()).collect())?,
        Backend::Mlx | Backend::Gpu(_) => composed(backend, &adjusted, rows)?,
    };
    let logprobs = report(&raw, &tokens, rows)?;
    for (index, row) in rows.iter_mut().enumerate() {
        row.advance(&crate::mlx::rows(&tokens, index, index + 1)?)?;
    }
    Ok(Drawn { tokens: tokens.squeeze_axes(&[1])?, logprobs })
}

/// The tokens `[rows, 1]`, by MLX's operations.
fn composed(backend: &Backend, adjusted: &Array, rows: &[&mut Sampler]) -> Result<Array> {
    let greedy = || argmax_axis(adjusted, -1, true);
    if rows.iter().all(|row| row.params.is_greedy()) {
        return Ok(greedy()?);
    }
    let tempered = adjusted.divide(column(rows, |p| if p.is_greedy() { 1.0 } else { p.temperature })?)?;
    let drawn = draw(&tempered, noise(backend, rows)?, rows)?;
    if rows.iter().any(|row| row.params.is_greedy()) {
        let draws = column(rows, |p| f32::from(!p.is_greedy()))?.gt(Array::from_f32(0.0))?;
        return Ok(select(&draws, &drawn, &greedy()?)?);
    }
    Ok(drawn)
}

/// One value per row as `[rows, 1]`.
fn column(rows: &[&mut Sampler], value: fn(&SamplingParams) -> f32) -> Result<Array> {
    let mut values: Vec<f32> = rows.iter().map(|row| value(&row.params)).collect();
    // See `mlx::indices` for why there are never less than four.
    values.resize(values.len().max(4), 0.0);
    let values = Array::from_slice(&values, &[values.len() as i32, 1]);
    if values.dim(0) as usize == rows.len() { Ok(values) } else { crate::mlx::rows(&values, 0, rows.len()) }
}

fn adjust_rows(raw: &Array, rows: &[&mut Sampler]) -> Result<Array> {
    if rows.iter().all(|row| !row.adjusts()) {
        return Ok(raw.clone());
    }
    let adjusted = rows
        .iter()
        .enumerate()
        .map(|(index, row)| row.adjust(crate::mlx::rows(raw, index, index + 1)?))
        .collect::<Result<Vec<_>>>()?;
    Ok(concatenate(&adjusted, 0)?)
}

/// Standard Gumbel noise for the next draw of each row, `[rows, vocab]`.
fn noise(backend: &Backend, rows: &[&mut Sampler]) -> Result<Array> {
    let vocab = rows.first().map_or(0, |row| row.vocab);
    let keys: Vec<u64> = rows.iter().map(|row| row.noise_key()).collect();
    if let Some(noise) = backend.gpu().map(|gpu| gpu.gumbel(&keys, vocab)).transpose()?.flatten() {
        return Ok(noise);
    }
    let row = |&key: &u64| mlx_rs::random::gumbel::<f32>(&[1, vocab as i32], &mlx_rs::random::key(key)?);
    Ok(concatenate(&keys.iter().map(row).collect::<std::result::Result<Vec<_>, _>>()?, 0)?)
}

/// Gumbel-max over what the filters keep: `[rows, 1]`.
fn draw(tempered: &Array, noise: Array, rows: &[&mut Sampler]) -> Result<Array> {
    let minus_infinity = Array::from_f32(f32::NEG_INFINITY);
    let kept = if rows.iter().any(|row| row.params.min_p > 0.0) {
        // ln(0) is minus infinity: a row without min-p keeps everything.
        let least = tempered.max_axis(-1, true)?.add(column(rows, |p| p.min_p.ln())?)?;
        select(&tempered.ge(&least)?, tempered, &minus_infinity)?
    } else {
        tempered.clone()
    };
    if !rows.iter().any(|row| row.params.sorts()) {
        return Ok(argmax_axis(kept.add(&noise)?, -1, true)?);
    }
    let order = mlx_rs::ops::argsort_axis(tempered.negative()?, -1)?;
    let sorted = tempered.take_along_axis(&order, -1)?;
    let ranks = ids(tempered.dim(1) as usize)?.as_type::<f32>()?;
    let in_top_k = ranks.lt(column(rows, |p| if p.top_k > 0 { p.top_k as f32 } else { f32::INFINITY })?)?;
    // The nucleus is measured on what top-k left.
    let probabilities = mlx_rs::ops::softmax_axis(select(&in_top_k, &sorted, &minus_infinity)?, -1, true)?;
    let before = probabilities.cumsum(-1, false, false)?;
    let in_nucleus = before.lt(column(rows, |p| if p.top_p < 1.0 { p.top_p } else { f32::INFINITY })?)?;
    let first = ranks.lt(Array::from_f32(1.0))?;
    let keep = in_nucleus.logical_and(in_top_k)?.logical_or(first)?;
    let filtered = select(&keep, &kept.take_along_axis(&order, -1)?, &minus_infinity)?;
    let place = argmax_axis(filtered.add(noise.take_along_axis(&order, -1)?)?, -1, true)?;
    Ok(order.take_along_axis(&place, -1)?)
}

fn report(raw: &Array, tokens: &Array, rows: &[&mut Sampler]) -> Result<Option<DrawnLogprobs>> {
    let Some(wanted) = rows.iter().filter_map(|row| row.params.top_logprobs).max() else { return Ok(None) };
    let logprobs = raw.subtract(mlx_rs::ops::logsumexp_axis(raw, -1, true)?)?;
    let drawn = logprobs.take_along_axis(tokens, -1)?.squeeze_axes(&[1])?.contiguous()?;
    let wanted = wanted.min(raw.dim(1) as usize) as i32;
    let top = if wanted == 0 {
        None
    } else {
        let order = mlx_rs::ops::argpartition_axis(logprobs.negative()?, wanted - 1, -1)?;
        let indices: Vec<u32> = (0..wanted as u32).collect();
        let ids = order.take_axis(Array::from_slice(&indices, &[wanted]), -1)?;
        let values = logprobs.take_along_axis(&ids, -1)?;
        // Of several rows MLX leaves columns that are no run of memory.
        Some((ids.contiguous()?, values.contiguous()?))
    };
    Ok(Some(DrawnLogprobs { drawn, top }))
}

#[cfg(test)]
mod tests;
