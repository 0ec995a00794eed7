//! The decoder-only transformer: what differs between architectures is a [`DecoderSpec`].

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::{
    Attention, AttentionSpec, CrossLayerAttention, CrossLayerSpec, DenseAndExperts, DenseAndExpertsSpec, Embedding,
    Experts, ExpertsSpec, GatedMlp, GatedSpec, Gathers, LatentAttention, LatentSpec, LayerInput, Linear, Mlp, MlpSpec,
    Norm, NormKind, PagedIndex, PerLayerInputSpec, PerLayerInputs, RecurrentLayer, RecurrentSpec, RmsNorm, StateIndex,
    StateLayout, StatePools,
};
use crate::cache::{GroupKind, KvLayout, Pages};
use crate::error::{Error, Result};
use crate::kernels::{Placement, StatePlacement};
use crate::weights::Weights;

/// Which tokens of which sequences pass layers together, and the pools that they extend.
pub struct Step<'a> {
    /// Positions in their sequences `[T]`, i32.
    pub positions: &'a Array,
    /// Keys and values so far; the step adds its own.
    pub pages: &'a mut Pages,
    /// Where the rows belong in each cache group.
    pub groups: Vec<StepGroup>,
    /// The states of layers that have some, and where the rows' sequences have theirs.
    pub states: Option<(&'a mut [StatePools], StateIndex)>,
    /// Computed after the newest writes to pools and states.
    pub written: Option<Array>,
    /// To be evaluated with the step: the writes that nothing in it reads.
    pub unread: Vec<Array>,
    /// Receives each layer's output `[T, hidden]` when set (parity tests).
    pub trace: Option<&'a mut Vec<Array>>,
}

/// Where the rows of a step belong in a cache group.
pub struct StepGroup {
    /// For the CPU kernels.
    pub placement: Arc<Placement>,
    /// The same for MLX's operations.
    pub gathers: Gathers,
    /// The same for GPU kernels.
    pub paged: PagedIndex,
}

impl<'a> Step<'a> {
    /// Tokens at `positions [T]`, with a placement for each cache group of `pages`.
    pub fn new(positions: &'a Array, pages: &'a mut Pages, placements: &[Arc<Placement>]) -> Self {
        let group = |placement: &Arc<Placement>| StepGroup {
            placement: Arc::clone(placement),
            gathers: Gathers::new(placement, pages.block_tokens()),
            paged: PagedIndex::new(placement, pages.block_tokens()),
        };
        let groups = placements.iter().map(group).collect();
        Self { positions, pages, groups, states: None, written: None, unread: Vec::new(), trace: None }
    }

    /// The same for a model with states, in `pools`, at the slots of `placement`.
    pub fn with_states(mut self, pools: &'a mut [StatePools], placement: &Arc<StatePlacement>) -> Self {
        self.states = Some((pools, StateIndex::new(placement)));
        self
    }

    /// The states of the layer that is number `place` of those that have some.
    fn states_of(&mut self, place: usize) -> Result<(&mut StatePools, &mut StateIndex)> {
        let (pools, index) = self.states.as_mut().ok_or_else(|| Error::internal("a step without states"))?;
        let pools = pools.get_mut(place).ok_or_else(|| Error::internal("a layer without states"))?;
        Ok((pools, index))
    }
}

/// A decoder as its architecture declares it.
#[derive(Debug, Clone)]
pub struct DecoderSpec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Kind of the norms of the residual stream.
    pub norm: NormKind,
    /// Their epsilon.
    pub norm_eps: f32,
    /// Where the norms of a layer stand.
    pub norms: NormPlacement,
    /// What the table of embeddings is called: `embed_tokens` or `embeddings`.
    pub embedding: &'static str,
    /// What the norm behind the last layer is called.
    pub final_norm: &'static str,
    /// Whether a checkpoint's RMS norms store how far they are from one although [`norm`](Self::norm) says otherwise: MLX's tools
    /// add one for some families, their authors do not.
    pub is_centred: Option<fn(&Weights) -> bool>,
    /// Multiplies embeddings before the first layer.
    pub embedding_scale: f32,
    /// Inputs of single layers beside the residual stream.
    pub per_layer_input: Option<PerLayerInputSpec>,
    /// Multiplies what attention and feed-forward layers give, before it is added.
    pub residual_scale: f32,
    /// Whether what a layer gives is multiplied by a number of its own, `layer_scalar [1]`.
    pub layer_scalar: bool,
    /// Where logits come from.
    pub head: OutputHead,
    /// Multiplies logits.
    pub logit_scale: f32,
    /// Logits become `cap * tanh(logit / cap)`, after they were multiplied.
    pub logit_cap: Option<f32>,
    /// Whether the checkpoint may have layers, behind the last or in `mtp`, that draw several tokens at once; they are left out.
    pub predicts_ahead: bool,
    /// Whether the checkpoint has parts that are not the language model's; they are left out.
    pub wrapped: bool,
    /// Positions the engine serves.
    pub context: usize,
    /// Positions that the model was made for, if that is known.
    pub max_positions: Option<usize>,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
}

impl DecoderSpec {
    /// What a token stores, as numbers of type `dtype`: layers with the same window are a cache group.
    pub fn kv_layout(&self, dtype: Dtype) -> KvLayout {
        let layer = |layer: &LayerSpec| match &layer.mixer {
            MixerSpec::Attention(AttentionSpec { kv_heads, head_dim, window, .. }) => {
                let rows = (*kv_heads, *head_dim);
                Some((window.map_or(GroupKind::Full, GroupKind::Window), rows, rows))
            }
            MixerSpec::Latent(spec) => Some((GroupKind::Full, (1, spec.key_width()), (1, spec.value_width()))),
            MixerSpec::CrossLayer(_) | MixerSpec::Recurrent(_) | MixerSpec::None => None,
        };
        KvLayout::new(&self.layers.iter().filter_map(layer).collect::<Vec<_>>(), dtype)
    }

    /// The same with the kind of norms that `weights` have.
    fn centred(&self, weights: &Weights) -> Self {
        let mut spec = self.clone();
        if self.is_centred.is_some_and(|is_centred| is_centred(weights)) {
            spec.norm = NormKind::RmsCentred;
            let norms = spec.attentions().filter_map(|attention| attention.qk_norm.as_mut());
            norms.for_each(|norm| norm.kind = NormKind::RmsCentred);
        }
        spec
    }

    /// Bytes of the states that a sequence has in all layers, at most.
    pub fn state_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.mixer.state_bytes()).sum()
    }

    /// Numbers of a row that travel behind its hidden state from layer to layer.
    pub fn carried_numbers(&self) -> usize {
        self.per_layer_input.map_or(0, |input| input.width * self.layers.len())
    }

    /// Whether layers read the keys and values of others.
    pub fn crosses_layers(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.mixer, MixerSpec::CrossLayer(_)))
    }

    /// The place of layer `index`, or of the one whose rows it reads, among those with keys and values, or among those with states.
    fn place(&self, index: usize) -> usize {
        let index = match &self.layers[index].mixer {
            MixerSpec::CrossLayer(spec) => spec.source.min(index),
            _ => index,
        };
        let of = |index: usize| self.layers[index].mixer.keeps();
        (0..index).filter(|&before| of(before) == of(index)).count()
    }
}

impl DecoderSpec {
    /// The layers' attention of the usual kind, for what an architecture changes in it.
    pub fn attentions(&mut self) -> impl Iterator<Item = &mut AttentionSpec> {
        self.layers.iter_mut().filter_map(|layer| match &mut layer.mixer {
            MixerSpec::Attention(spec) => Some(spec),
            MixerSpec::CrossLayer(spec) => Some(&mut spec.attention),
            MixerSpec::Latent(_) | MixerSpec::Recurrent(_) | MixerSpec::None => None,
        })
    }
}

/// What makes logits of the last hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputHead {
    /// The embedding table.
    Tied,
    /// A matrix of its own.
    Own,
    /// The one of the two that the checkpoint has: families disagree on what a config that is silent means.
    AsStored,
    /// Nothing: hidden states are all that is wanted.
    None,
}

impl OutputHead {
    /// With `AsStored` decided; `weights` are those that nothing was taken of yet.
    pub fn decided(self, weights: &Weights) -> Self {
        match self {
            Self::AsStored if weights.contains(&format!("{}lm_head.weight", prefixes(weights).1)) => Self::Own,
            Self::AsStored => Self::Tied,
            other => other,
        }
    }
}

/// Where the norms of a layer stand, and what checkpoints call them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before the mixer and before the feed-forward layer, with these names.
    Before([&'static str; 2]),
    /// Before and after both (Gemma 2): `input_layernorm`, `post_attention_layernorm`, `pre_feedforward_layernorm` and
    /// `post_feedforward_layernorm`.
    Around,
    /// After both, on what is then added (OLMo 2): `post_attention_layernorm` and `post_feedforward_layernorm`.
    After,
    /// Once (`input_layernorm`), before attention and feed-forward layer, which run side by side (Cohere).
    Parallel,
}

impl NormPlacement {
    /// Before both parts, with Llama's names.
    pub const BEFORE: Self = Self::Before(["input_layernorm", "post_attention_layernorm"]);
}

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
enum Kept {
    Rows,
    State,
    Nothing,
}

impl MixerSpec {
    fn keeps(&self) -> Kept {
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
enum Mixer {
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
pub(super) fn scaled(x: Array, factor: f32) -> Result<Array> {
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
struct Layer {
    norms: LayerNorms,
    mixer: Option<Mixer>,
    feed_forward: Option<FeedForward>,
    input: Option<LayerInput>,
    /// Multiplies what the layer gives, `[1]`.
    scalar: Option<Array>,
}

impl Layer {
    fn load(weights: &mut Weights, path: &str, index: usize, spec: &DecoderSpec) -> Result<Self> {
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
    fn forward(&self, x: &Array, input: Option<&Array>, step: &mut Step<'_>) -> Result<Array> {
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

/// A loaded decoder, with the tensor names of Hugging Face's Llama family.
#[derive(Debug)]
pub struct Decoder {
    embedding: Embedding,
    embedding_scale: f32,
    inputs: Option<PerLayerInputs>,
    layers: Vec<Layer>,
    norm: Norm,
    /// Without it the embedding table, if there are logits at all.
    own_head: Option<Linear>,
    head: OutputHead,
    logit_scale: f32,
    logit_cap: Option<f32>,
    layout: KvLayout,
}

/// What may precede the names of all tensors but the head's, and those of the head's: nothing where a model was saved without its
/// head, and more where it is a part of another one.
const PREFIXES: [(&str, &str); 5] = [
    ("model.", ""),
    ("", ""),
    ("backbone.", ""),
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
];

/// What the table of embeddings is called.
const TABLES: [&str; 2] = ["embed_tokens", "embeddings"];

/// Those of a model whose tensors are `weights`.
fn prefixes(weights: &Weights) -> (&'static str, &'static str) {
    let stored =
        |(prefix, _): &(&str, &str)| TABLES.iter().any(|table| weights.contains(&format!("{prefix}{table}.weight")));
    PREFIXES.into_iter().find(stored).unwrap_or(PREFIXES[0])
}

impl Decoder {
    /// Takes all weights that `spec` describes.
    pub fn load(weights: &mut Weights, spec: &DecoderSpec) -> Result<Self> {
        let spec = &spec.centred(weights);
        let (hidden, head) = (spec.hidden, spec.head.decided(weights));
        let (prefix, head_prefix) = prefixes(weights);
        if spec.wrapped {
            weights.discard(|name| !name.starts_with(prefix) && !name.starts_with(&format!("{head_prefix}lm_head.")));
        }
        if spec.predicts_ahead {
            let layer =
                |name: &str| name.strip_prefix(prefix)?.strip_prefix("layers.")?.split('.').next()?.parse().ok();
            let behind = |name: &str| layer(name).is_some_and(|layer: usize| layer >= spec.layers.len());
            weights.discard(|name| name.starts_with("mtp.") || behind(name));
        }
        // Old exports carry the rotary tables, and some tied models a copy of their head.
        let tied = head == OutputHead::Tied;
        weights.discard(|name| {
            name.ends_with("rotary_emb.inv_freq") || (tied && name.starts_with(&format!("{head_prefix}lm_head.")))
        });
        let embedding = Embedding::load(weights, &format!("{prefix}{}", spec.embedding), spec.vocab, hidden)?;
        let shape = (hidden, spec.layers.len());
        let inputs = spec.per_layer_input;
        let inputs = inputs.map(|inputs| PerLayerInputs::load(weights, prefix, shape, spec.norm_eps, inputs));
        let inputs = inputs.transpose()?;
        let layers = (0..spec.layers.len())
            .map(|index| Layer::load(weights, &format!("{prefix}layers.{index}"), index, spec))
            .collect::<Result<_>>()?;
        let norm = Norm::load(weights, &format!("{prefix}{}", spec.final_norm), hidden, spec.norm, spec.norm_eps)?;
        let head_path = format!("{head_prefix}lm_head");
        let own_head = (head == OutputHead::Own).then(|| Linear::load(weights, &head_path, hidden, spec.vocab, false));
        let layout = spec.kv_layout(weights.float_type());
        let own_head = own_head.transpose()?;
        let DecoderSpec { embedding_scale, logit_scale, logit_cap, .. } = *spec;
        Ok(Self { embedding, embedding_scale, inputs, layers, norm, own_head, head, logit_scale, logit_cap, layout })
    }

    /// What a token keeps.
    pub fn kv_layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What a sequence keeps in each layer with a state, in their order.
    pub fn state_layouts(&self) -> Vec<StateLayout> {
        let layout = |layer: &Layer| match layer.mixer.as_ref()? {
            Mixer::Recurrent(recurrent, _) => Some(recurrent.state_layout().clone()),
            Mixer::Attention(_) | Mixer::CrossLayer(_) | Mixer::Latent(_) => None,
        };
        self.layers.iter().filter_map(layout).collect()
    }

    /// Its layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// What the first layer takes of `tokens [T]` (u32): `[T, hidden]`, and behind it the inputs of single layers.
    pub fn embed(&self, tokens: &Array) -> Result<Array> {
        let x = scaled(self.embedding.forward(tokens)?, self.embedding_scale)?;
        match &self.inputs {
            Some(inputs) => inputs.join(tokens, &x),
            None => Ok(x),
        }
    }

    /// Runs some of the layers over the step's tokens: `x [T, hidden]` (and the inputs of single layers) before the first of them,
    /// the same shape behind the last; behind the last of all `[T, hidden]`.
    pub fn pass(&self, x: Array, layers: Range<usize>, step: &mut Step<'_>) -> Result<Array> {
        let (mut x, inputs) = match &self.inputs {
            Some(all) => {
                let (x, rows) = all.part(&x)?;
                (x, Some((all, rows)))
            }
            None => (x, None),
        };
        for index in layers.clone() {
            let input = inputs.as_ref().map(|(all, rows)| all.of_layer(rows, index)).transpose()?;
            x = self.layers[index].forward(&x, input.as_ref(), step)?;
            if let Some(trace) = step.trace.as_deref_mut() {
                trace.push(x.clone());
            }
        }
        match inputs {
            Some((_, rows)) if layers.end < self.layers.len() => Ok(mlx_rs::ops::concatenate(&[x, rows], 1)?),
            _ => Ok(x),
        }
    }

    /// `hidden [T, hidden]` behind the last layer to what the head takes of it.
    pub fn final_norm(&self, hidden: &Array) -> Result<Array> {
        self.norm.forward(hidden)
    }

    /// Logits `[n, vocab]` of the rows `wanted [n]` (i32) of `hidden [T, hidden]`; of all of them without it.
    pub fn logits(&self, hidden: &Array, wanted: Option<&Array>) -> Result<Array> {
        let normed = match wanted {
            Some(wanted) => self.norm.forward(&hidden.take_axis(wanted, 0)?)?,
            None => self.norm.forward(hidden)?,
        };
        let logits = match (&self.own_head, self.head) {
            (Some(head), _) => head.forward(&normed)?,
            (None, OutputHead::None) => return Err(Error::internal("this model was loaded without its output head")),
            (None, _) => self.embedding.as_head(&normed)?,
        };
        let logits = scaled(logits, self.logit_scale)?;
        match self.logit_cap {
            Some(cap) => scaled(mlx_rs::ops::tanh(scaled(logits, 1.0 / cap)?)?, cap),
            None => Ok(logits),
        }
    }
}
