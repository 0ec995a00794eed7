//! A layer of a decoder: what its description says, and what it is once it is loaded.

use mlx_rs::Array;

use super::{DecoderSpec, NormPlacement, Step};
use crate::error::Result;
use crate::nn::{
    Attention, AttentionSpec, CrossLayerAttention, CrossLayerSpec, DenseAndExperts, DenseAndExpertsSpec, Experts,
    ExpertsSpec, GatedMlp, GatedSpec, LatentAttention, LatentSpec, LayerInput, Mlp, MlpSpec, Norm, RecurrentLayer,
    RecurrentSpec, RmsNorm,
};
use crate::weights::Weights;

/// One decoder layer. If it has one part only, it has no norms of the other one either.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Its first part.
    pub mixer: MixerSpec,
    /// Where that one's tensors are, under the layer's path.
    pub mixer_path: &'static str,
    /// Its feed-forward layer.
    pub feed_forward: FeedForwardSpec,
    /// Where that one's tensors are, under the layer's path; empty if they are its own.
    pub feed_forward_path: &'static str,
}

/// How the tokens of a sequence learn of each other.
#[derive(Debug, Clone)]
pub enum MixerSpec {
    /// Attention with keys and values of their own.
    Attention(AttentionSpec),
    /// Attention over the keys and values of an earlier layer.
    CrossLayer(CrossLayerSpec),
    /// Attention whose keys and values are projections of a narrow row.
    Latent(LatentSpec),
    /// A state instead of keys and values.
    Recurrent(RecurrentSpec),
    /// Not at all: the layer is a feed-forward layer.
    None,
}

/// What a mixer keeps of a sequence.
#[derive(PartialEq)]
pub(super) enum Kept {
    Rows,
    State,
    Nothing,
}

impl MixerSpec {
    pub(super) fn keeps(&self) -> Kept {
        match self {
            Self::Attention(_) | Self::Latent(_) => Kept::Rows,
            Self::Recurrent(_) => Kept::State,
            Self::CrossLayer(_) | Self::None => Kept::Nothing,
        }
    }

    /// Numbers of a row that are alive in the layer at the same time.
    pub fn row_numbers(&self) -> usize {
        match self {
            Self::Attention(spec) => 2 * (spec.heads + spec.kv_heads) * spec.head_dim,
            Self::CrossLayer(spec) => spec.row_numbers(),
            Self::Latent(spec) => spec.row_numbers(),
            Self::Recurrent(spec) => spec.row_numbers(),
            Self::None => 0,
        }
    }

    /// Bytes of the state that it keeps of a sequence, at most.
    pub fn state_bytes(&self) -> usize {
        match self {
            Self::Attention(_) | Self::CrossLayer(_) | Self::Latent(_) | Self::None => 0,
            Self::Recurrent(spec) => spec.state_bytes(),
        }
    }

    /// `place` is that of [`DecoderSpec::place`].
    fn load(&self, weights: &mut Weights, path: &str, place: usize, decoder: &DecoderSpec) -> Result<Option<Mixer>> {
        let DecoderSpec { hidden, context, .. } = *decoder;
        Ok(Some(match self {
            Self::Attention(spec) => {
                Mixer::Attention(Box::new(Attention::load(weights, path, hidden, place, spec, context)?))
            }
            Self::CrossLayer(spec) => {
                let source = (decoder.layers.get(spec.source).map(|layer| &layer.mixer), place);
                let attention = CrossLayerAttention::load(weights, path, hidden, source, spec, context)?;
                Mixer::CrossLayer(Box::new(attention))
            }
            Self::Latent(spec) => {
                Mixer::Latent(Box::new(LatentAttention::load(weights, path, hidden, place, spec, context)?))
            }
            Self::Recurrent(spec) => Mixer::Recurrent(Box::new(spec.load(weights, path)?), place),
            Self::None => return Ok(None),
        }))
    }
}

#[derive(Debug)]
pub(super) enum Mixer {
    Attention(Box<Attention>),
    CrossLayer(Box<CrossLayerAttention>),
    Latent(Box<LatentAttention>),
    /// And the place of its states.
    Recurrent(Box<RecurrentLayer>, usize),
}

impl Mixer {
    /// `[T, hidden]`: of `x`, normalised before if there is a norm, and added to `residual` if there is one.
    fn forward(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        residual: Option<&Array>,
        step: &mut Step<'_>,
    ) -> Result<Array> {
        match self {
            Self::Attention(attention) => attention.forward(x, norm, residual, step),
            Self::CrossLayer(attention) => attention.forward(x, norm, residual, step),
            Self::Latent(attention) => attention.forward(x, norm, residual, step),
            Self::Recurrent(layer, place) => {
                let states = step.states_of(*place)?;
                let y = layer.forward(x, norm, residual, states)?;
                // Also of a prompt's piece, of which nothing else is wanted, the states are.
                step.written = Some(y.clone());
                Ok(y)
            }
        }
    }
}

/// What follows the mixer in a layer.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // One for each layer, and gone when that is loaded.
pub enum FeedForwardSpec {
    /// One gated network for all tokens.
    Gated(GatedSpec),
    /// One of two matrices, which are called that.
    Plain(MlpSpec, [&'static str; 2]),
    /// Several, of which each token passes a few.
    Experts(ExpertsSpec),
    /// Both, side by side.
    DenseAndExperts(DenseAndExpertsSpec),
    /// Nothing: the layer ends behind its mixer.
    None,
}

impl FeedForwardSpec {
    /// Width inside, of all that a token passes.
    pub fn inner(&self) -> usize {
        match self {
            Self::Gated(spec) => spec.inner,
            Self::Plain(spec, _) => spec.inner,
            Self::Experts(spec) => spec.per_token * spec.inner,
            Self::DenseAndExperts(spec) => spec.dense.inner + spec.experts.per_token * spec.experts.inner,
            Self::None => 0,
        }
    }

    /// Numbers of a row of width `hidden` that are alive in the layer at the same time.
    pub fn row_numbers(&self, hidden: usize) -> usize {
        match self {
            Self::Gated(spec) => 3 * spec.inner,
            Self::Plain(spec, _) => 2 * spec.inner,
            Self::Experts(spec) => spec.row_numbers(hidden),
            Self::DenseAndExperts(spec) => spec.row_numbers(hidden),
            Self::None => 0,
        }
    }

    fn load(&self, weights: &mut Weights, path: &str, hidden: usize) -> Result<Option<FeedForward>> {
        Ok(Some(match self {
            Self::Gated(spec) => FeedForward::Gated(GatedMlp::load(weights, path, hidden, spec)?),
            Self::Plain(spec, names) => {
                let [input, output] = names.map(|name| format!("{path}.{name}"));
                FeedForward::Plain(Mlp::load(weights, &input, &output, hidden, spec)?)
            }
            Self::Experts(spec) => FeedForward::Experts(Box::new(Experts::load(weights, path, hidden, spec)?)),
            Self::DenseAndExperts(spec) => {
                FeedForward::DenseAndExperts(Box::new(DenseAndExperts::load(weights, path, hidden, spec)?))
            }
            Self::None => return Ok(None),
        }))
    }
}

#[derive(Debug)]
enum FeedForward {
    Gated(GatedMlp),
    Plain(Mlp),
    Experts(Box<Experts>),
    DenseAndExperts(Box<DenseAndExperts>),
}

impl FeedForward {
    /// `[T, hidden]`: of `x`, normalised before if there is a norm, and added to `residual` if there is one.
    fn forward(&self, x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>) -> Result<Array> {
        match self {
            Self::Gated(mlp) => mlp.forward(x, norm, residual),
            Self::Plain(mlp) => mlp.forward(x, norm, residual),
            Self::Experts(experts) => experts.forward(x, norm, residual),
            Self::DenseAndExperts(both) => both.forward(x, norm, residual),
        }
    }
}

/// What stands before and after a part of a layer.
#[derive(Debug)]
struct Around {
    before: Option<Norm>,
    after: Option<Norm>,
    /// Multiplies what the part gives.
    scale: f32,
}

impl Around {
    /// `x + scale * after(part(before(x)))`. A `part` gets its input, a norm that it applies to that before, and what it adds its
    /// result to: kernels do all three at once.
    fn forward(
        &self,
        x: &Array,
        part: impl FnOnce(&Array, Option<&RmsNorm>, Option<&Array>) -> Result<Array>,
    ) -> Result<Array> {
        let plain = self.after.is_none() && self.scale == 1.0;
        let residual = plain.then_some(x);
        let mut y = match &self.before {
            Some(Norm::Rms(norm)) => part(x, Some(norm), residual)?,
            Some(norm) => part(&norm.forward(x)?, None, residual)?,
            None => part(x, None, residual)?,
        };
        if plain {
            return Ok(y);
        }
        if let Some(norm) = &self.after {
            y = norm.forward(&y)?;
        }
        Ok(x.add(scaled(y, self.scale)?)?)
    }
}

/// `x` times a constant, in the type of `x`.
pub(in crate::nn) fn scaled(x: Array, factor: f32) -> Result<Array> {
    if factor == 1.0 { Ok(x) } else { Ok(x.multiply(Array::from_f32(factor).as_dtype(x.dtype())?)?) }
}

#[derive(Debug)]
enum LayerNorms {
    /// Of attention and of the feed-forward layer, which follow each other.
    Chain([Around; 2]),
    /// Of both, side by side.
    Parallel(Norm),
}

#[derive(Debug)]
pub(super) struct Layer {
    norms: LayerNorms,
    pub(super) mixer: Option<Mixer>,
    feed_forward: Option<FeedForward>,
    input: Option<LayerInput>,
    /// Multiplies what the layer gives, `[1]`.
    scalar: Option<Array>,
}

impl Layer {
    pub(super) fn load(weights: &mut Weights, path: &str, index: usize, spec: &DecoderSpec) -> Result<Self> {
        let layer = &spec.layers[index];
        let under = |part: &str| if part.is_empty() { path.to_owned() } else { format!("{path}.{part}") };
        let mixer = layer.mixer.load(weights, &under(layer.mixer_path), spec.place(index), spec)?;
        let feed_forward = layer.feed_forward.load(weights, &under(layer.feed_forward_path), spec.hidden)?;
        let norm = |weights: &mut Weights, name: &str| {
            Norm::load(weights, &format!("{path}.{name}"), spec.hidden, spec.norm, spec.norm_eps)
        };
        let mut around = |is_there: bool, [before, after]: [Option<&str>; 2]| -> Result<Around> {
            let mut norm = |name: Option<&str>| name.filter(|_| is_there).map(|name| norm(weights, name)).transpose();
            Ok(Around { before: norm(before)?, after: norm(after)?, scale: spec.residual_scale })
        };
        let mut chain = |first: [Option<&str>; 2], second: [Option<&str>; 2]| -> Result<LayerNorms> {
            Ok(LayerNorms::Chain([around(mixer.is_some(), first)?, around(feed_forward.is_some(), second)?]))
        };
        let (behind_mixer, behind) = (Some("post_attention_layernorm"), Some("post_feedforward_layernorm"));
        let norms = match spec.norms {
            NormPlacement::Before([first, second]) => chain([Some(first), None], [Some(second), None])?,
            NormPlacement::Around => {
                chain([Some("input_layernorm"), behind_mixer], [Some("pre_feedforward_layernorm"), behind])?
            }
            NormPlacement::After => chain([None, behind_mixer], [None, behind])?,
            NormPlacement::Parallel => LayerNorms::Parallel(norm(weights, "input_layernorm")?),
        };
        let input =
            spec.per_layer_input.map(|input| LayerInput::load(weights, path, spec.hidden, input.width, spec.norm_eps));
        let input = input.transpose()?;
        let scalar = spec.layer_scalar.then(|| weights.tensor(&under("layer_scalar"), &[1])).transpose()?;
        Ok(Self { norms, mixer, feed_forward, input, scalar })
    }

    /// `x [T, hidden]`, same shape out; `input [T, width]` is the layer's own, if it takes one.
    pub(super) fn forward(&self, x: &Array, input: Option<&Array>, step: &mut Step<'_>) -> Result<Array> {
        let mut y = self.parts(x, step)?;
        if let (Some(layer), Some(input)) = (&self.input, input) {
            y = layer.forward(&y, input)?;
        }
        match &self.scalar {
            Some(scalar) => Ok(y.multiply(scalar)?),
            None => Ok(y),
        }
    }

    /// Mixer and feed-forward layer, `[T, hidden]`.
    fn parts(&self, x: &Array, step: &mut Step<'_>) -> Result<Array> {
        let mut x = x.clone();
        let Self { norms, mixer, feed_forward, .. } = self;
        match norms {
            LayerNorms::Chain([first, second]) => {
                if let Some(mixer) = mixer {
                    x = first.forward(&x, |x, norm, residual| mixer.forward(x, norm, residual, step))?;
                }
                if let Some(feed_forward) = feed_forward {
                    x = second.forward(&x, |x, norm, residual| feed_forward.forward(x, norm, residual))?;
                }
            }
            LayerNorms::Parallel(norm) => {
                let normed = norm.forward(&x)?;
                if let Some(mixer) = mixer {
                    x = mixer.forward(&normed, None, Some(&x), step)?;
                }
                if let Some(feed_forward) = feed_forward {
                    x = feed_forward.forward(&normed, None, Some(&x))?;
                }
            }
        }
        Ok(x)
    }
}
