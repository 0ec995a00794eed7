//! Rotary position embeddings (Su et al. 2021) and the ways models stretch them.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::kernels::Rotation;
use crate::mlx;

/// The rotary settings of a `config.json`, in any of the spellings that exist.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RopeSpec {
    rope_theta: Option<f32>,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Scaling>,
    /// Where transformers 5 keeps both of the above.
    rope_parameters: Option<Scaling>,
    max_position_embeddings: Option<usize>,
    /// Where Phi keeps what others have in `rope_scaling`.
    original_max_position_embeddings: Option<usize>,
}

/// Frequencies may be given once or per pair of dimensions.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Factors {
    One(f32),
    Each(Vec<f32>),
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Scaling {
    rope_type: Option<String>,
    /// The older spelling; some configs have both.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    beta_fast: Option<f32>,
    beta_slow: Option<f32>,
    mscale: Option<f32>,
    mscale_all_dim: Option<f32>,
    attention_factor: Option<f32>,
    short_factor: Option<Factors>,
    long_factor: Option<Factors>,
    partial_rotary_factor: Option<f32>,
    /// Whether the ends of YaRN's ramp are whole dimensions; they are, unless this says no.
    truncate: Option<bool>,
}

/// Rotates the first `dims` of every head by angles that grow with the token's position.
#[derive(Debug)]
pub struct Rope {
    /// What the CPU kernels need; its magnitude is the "attention factor" of YaRN and LongRoPE.
    rotation: Rotation,
    /// Angle per position of each pair, `[1, 1, dims / 2]` f32.
    frequencies: Array,
}

const DEFAULT_THETA: f32 = 10_000.0;

impl RopeSpec {
    /// Without any scaling.
    pub fn plain(theta: f32) -> Self {
        Self { rope_theta: Some(theta), ..Self::default() }
    }

    /// The same, with pairs of neighbours instead of halves.
    pub fn traditional(self) -> Self {
        Self { rope_traditional: true, ..self }
    }

    /// The same base, without any scaling.
    pub fn unscaled(&self) -> Self {
        Self { rope_traditional: self.rope_traditional, ..Self::plain(self.theta()) }
    }

    /// How many of `width` dimensions turn, where an architecture leaves that to the config: all, if it is silent.
    pub fn dims(&self, width: usize, factor: Option<f32>) -> usize {
        let nested = self.rope_parameters.as_ref().and_then(|p| p.partial_rotary_factor);
        factor.or(nested).map_or(width, |factor| (width as f32 * factor) as usize)
    }

    /// Positions that the model was made for, if its config says.
    pub fn max_positions(&self) -> Option<usize> {
        self.max_position_embeddings
    }

    /// The base of the angles.
    pub fn theta(&self) -> f32 {
        let nested = [&self.rope_parameters, &self.rope_scaling].into_iter().flatten().find_map(|s| s.rope_theta);
        self.rope_theta.or(nested).unwrap_or(DEFAULT_THETA)
    }

    /// The rotation of heads whose first `dims` dimensions turn, for contexts of up to `context` tokens.
    pub fn build(&self, dims: usize, context: usize) -> Result<Rope> {
        let scaling = self.rope_scaling.clone().or_else(|| self.rope_parameters.clone()).unwrap_or_default();
        let theta = self.theta();
        let (mut stretched, mut scale, mut magnitude) = (None, 1.0, 1.0);
        let kind = scaling.rope_type.as_deref().or(scaling.r#type.as_deref()).unwrap_or("default");
        match kind {
            // Of text, all positions of "multimodal" embeddings are the same.
            "default" | "mrope" => {}
            "linear" => scale = 1.0 / scaling.need_factor(kind)?,
            "llama3" => stretched = Some(llama3(dims, theta, &scaling)?),
            "proportional" => stretched = Some(proportional(dims, theta, &scaling)?),
            "yarn" => {
                let (wavelengths, factor) = yarn(dims, theta, &scaling)?;
                (stretched, magnitude) = (Some(wavelengths), factor);
            }
            "longrope" | "su" => {
                let trained = self.max_position_embeddings.unwrap_or(context);
                let original = scaling.original_max_position_embeddings.or(self.original_max_position_embeddings);
                let scaling = Scaling { original_max_position_embeddings: original, ..scaling };
                let (wavelengths, factor) = longrope(dims, theta, &scaling, trained, context)?;
                (stretched, magnitude) = (Some(wavelengths), factor);
            }
            other => {
                return Err(Error::unsupported(format!(
                    "rope scaling {other:?} is not supported (known: default, linear, llama3, proportional, yarn, longrope)"
                )));
            }
        }
        let plain = || plain_wavelengths(dims, theta);
        let frequencies = stretched.unwrap_or_else(plain).iter().map(|w| scale / w).collect();
        Ok(Rope::new(Rotation { dims, frequencies, traditional: self.rope_traditional, magnitude }))
    }
}

impl Scaling {
    fn need_factor(&self, kind: &str) -> Result<f32> {
        match self.factor {
            Some(factor) if factor.is_finite() && factor > 0.0 => Ok(factor),
            other => Err(Error::invalid_model(format!("rope scaling {kind:?} has no usable \"factor\": {other:?}"))),
        }
    }
}

/// `theta^(2i / dims)` for every pair of dimensions.
fn plain_wavelengths(dims: usize, theta: f32) -> Vec<f32> {
    (0..dims).step_by(2).map(|i| theta.powf(i as f32 / dims as f32)).collect()
}

/// Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
fn llama3(dims: usize, theta: f32, scaling: &Scaling) -> Result<Vec<f32>> {
    let factor = scaling.need_factor("llama3")?;
    let low = scaling.low_freq_factor.unwrap_or(1.0);
    let high = scaling.high_freq_factor.unwrap_or(4.0);
    if high <= low {
        return Err(Error::invalid_model("rope scaling \"llama3\" needs high_freq_factor above low_freq_factor"));
    }
    let original = scaling.original_max_position_embeddings.unwrap_or(8192) as f32;
    let stretch = |w: f32| {
        let length = 2.0 * std::f32::consts::PI * w;
        if length > original / low {
            w * factor
        } else if length > original / high {
            let smooth = (original / length - low) / (high - low);
            w / ((1.0 - smooth) / factor + smooth)
        } else {
            w
        }
    };
    Ok(plain_wavelengths(dims, theta).into_iter().map(stretch).collect())
}

/// Gemma 4: the first `partial_rotary_factor` of all pairs turn, as fast as if the others did too, which never do.
fn proportional(dims: usize, theta: f32, scaling: &Scaling) -> Result<Vec<f32>> {
    let part = scaling.partial_rotary_factor.unwrap_or(1.0);
    if !(part > 0.0 && part <= 1.0) {
        return Err(Error::invalid_model(format!("rope scaling \"proportional\" of {part} of all dimensions")));
    }
    let factor = scaling.factor.map_or(Ok(1.0), |_| scaling.need_factor("proportional"))?;
    let turning = ((dims as f32 * part) as usize).div_ceil(2);
    let wavelengths = plain_wavelengths(dims, theta).into_iter().enumerate();
    Ok(wavelengths.map(|(pair, w)| if pair < turning { factor * w } else { f32::INFINITY }).collect())
}

/// YaRN (Peng et al. 2023): a linear ramp between kept and stretched wavelengths, and a factor on the input.
fn yarn(dims: usize, theta: f32, scaling: &Scaling) -> Result<(Vec<f32>, f32)> {
    let factor = scaling.need_factor("yarn")?;
    let original = scaling.original_max_position_embeddings.unwrap_or(4096) as f32;
    let dimension_of =
        |rotations: f32| dims as f32 * (original / (rotations * 2.0 * std::f32::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) =
        (dimension_of(scaling.beta_fast.unwrap_or(32.0)), dimension_of(scaling.beta_slow.unwrap_or(1.0)));
    if scaling.truncate != Some(false) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dims as f32 - 1.0));
    if high == low {
        high += 0.001;
    }
    let wavelengths = plain_wavelengths(dims, theta)
        .into_iter()
        .enumerate()
        .map(|(i, kept)| {
            let stretched = factor * kept;
            let keep = 1.0 - ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
            (stretched * kept) / (stretched * keep + kept * (1.0 - keep))
        })
        .collect();
    let magnitude_of = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let computed = magnitude_of(scaling.mscale.unwrap_or(1.0)) / magnitude_of(scaling.mscale_all_dim.unwrap_or(0.0));
    Ok((wavelengths, scaling.attention_factor.unwrap_or(computed)))
}

/// LongRoPE (Ding et al. 2024). The choice between short and long factors is made once, by the context the engine
/// serves: switching in mid-sequence would contradict keys that are already in the cache.
fn longrope(dims: usize, theta: f32, scaling: &Scaling, trained: usize, context: usize) -> Result<(Vec<f32>, f32)> {
    let missing = |what: &str| Error::invalid_model(format!("rope scaling \"longrope\" has no {what:?}"));
    let original =
        scaling.original_max_position_embeddings.ok_or_else(|| missing("original_max_position_embeddings"))?;
    let (name, factors) = if context > original {
        ("long_factor", scaling.long_factor.as_ref())
    } else {
        ("short_factor", scaling.short_factor.as_ref())
    };
    let factors = match factors.ok_or_else(|| missing(name))? {
        Factors::One(factor) => vec![*factor; dims / 2],
        Factors::Each(each) if each.len() == dims / 2 => each.clone(),
        Factors::Each(each) => {
            return Err(Error::invalid_model(format!("{name:?} has {} entries instead of {}", each.len(), dims / 2)));
        }
    };
    let wavelengths = plain_wavelengths(dims, theta).iter().zip(&factors).map(|(w, f)| w * f).collect();
    let ratio = scaling.factor.unwrap_or(trained as f32 / original as f32);
    let computed = if ratio <= 1.0 { 1.0 } else { (1.0 + ratio.ln() / (original as f32).ln()).sqrt() };
    Ok((wavelengths, scaling.attention_factor.unwrap_or(computed)))
}

impl Rope {
    /// Turns nothing.
    pub fn none() -> Self {
        Self::new(Rotation { dims: 0, frequencies: Arc::new([]), traditional: false, magnitude: 1.0 })
    }

    fn new(rotation: Rotation) -> Self {
        let frequencies = Array::from_slice(&rotation.frequencies, &[1, 1, rotation.frequencies.len() as i32]);
        Self { rotation, frequencies }
    }

    /// What the CPU kernels need to know.
    pub(super) fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    /// Rotates `x [T, heads, width]`; `positions [T]` i32 are the tokens' places in their sequences.
    ///
    /// In plain operations: MLX's own takes one offset for each sequence of a batch, and with tokens as the batch its CUDA kernel
    /// is launched with more threads along one dimension than there may be.
    pub fn forward(&self, x: &Array, positions: &Array) -> Result<Array> {
        let Rotation { dims, traditional, magnitude, .. } = self.rotation;
        if dims == 0 {
            return Ok(x.clone());
        }
        let (tokens, heads, width) = (x.dim(0), x.dim(1), x.dim(2) as usize);
        let angles = positions.as_dtype(Dtype::Float32)?.reshape(&[tokens, 1, 1])?.multiply(&self.frequencies)?;
        let factor = Array::from_f32(magnitude);
        let (cos, sin) = (angles.cos()?.multiply(&factor)?, angles.sin()?.multiply(&factor)?);
        let turning = mlx::slice_axis(x, 2, 0, dims)?.as_dtype(Dtype::Float32)?;
        // Neighbours are a pair, or a dimension and the one half of all further on.
        let half = (dims / 2) as i32;
        let (shape, axis) = if traditional { ([tokens, heads, half, 2], 3) } else { ([tokens, heads, 2, half], 2) };
        let pairs = turning.reshape(&shape)?;
        let part = |at: usize| -> Result<Array> {
            Ok(mlx::slice_axis(&pairs, axis, at, at + 1)?.squeeze_axes(&[axis as i32])?)
        };
        let (one, other) = (part(0)?, part(1)?);
        let turned =
            [one.multiply(&cos)?.subtract(other.multiply(&sin)?)?, one.multiply(&sin)?.add(other.multiply(&cos)?)?];
        let turned = mlx_rs::ops::stack(&turned, axis as i32)?.reshape(&[tokens, heads, dims as i32])?;
        let turned = turned.as_dtype(x.dtype())?;
        if dims == width {
            return Ok(turned);
        }
        Ok(mlx_rs::ops::concatenate(&[&turned, &mlx::slice_axis(x, 2, dims, width)?], 2)?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn in_proportion_the_first_pairs_turn_as_if_all_did() {
        let rotation = |rope: serde_json::Value| {
            let spec: RopeSpec = serde_json::from_value(json!({ "rope_parameters": rope })).unwrap();
            spec.build(8, 64).map(|rope| rope.rotation().clone())
        };
        let proportional = |part: f32| {
            rotation(json!({"rope_type": "proportional", "rope_theta": 16.0, "partial_rotary_factor": part}))
        };
        let half = proportional(0.5).unwrap();
        assert_eq!((half.dims, &half.frequencies[..]), (8, &[1.0, 0.5, 0.0, 0.0][..]));
        let all = rotation(json!({"rope_type": "default", "rope_theta": 16.0})).unwrap();
        assert_eq!(proportional(1.0).unwrap().frequencies, all.frequencies);
        for part in [0.0, -0.5, 1.5] {
            assert!(proportional(part).is_err(), "{part}");
        }
    }

    #[test]
    fn both_spellings_of_the_type_may_be_there() {
        for scaling in [
            json!({"type": "linear", "factor": 2.0}),
            json!({"rope_type": "linear", "factor": 2.0}),
            json!({"type": "linear", "rope_type": "linear", "factor": 2.0}),
        ] {
            let spec: RopeSpec = serde_json::from_value(json!({"rope_theta": 1e4, "rope_scaling": scaling})).unwrap();
            assert_eq!(spec.build(8, 64).unwrap().rotation().frequencies[0], 0.5);
        }
    }
}
