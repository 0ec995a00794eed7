//! The decoder-only transformer: what differs between architectures is a [`DecoderSpec`].

mod layer;

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::{
    AttentionSpec, Embedding, Gathers, Linear, Norm, NormKind, PagedIndex, PerLayerInputSpec, PerLayerInputs,
    StateIndex, StateLayout, StatePools,
};
pub(super) use layer::scaled;
pub use layer::{FeedForwardSpec, LayerSpec, MixerSpec};
use layer::{Layer, Mixer};

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
    /// What a token stores, as numbers of type `dtype`: layers with windows of the same length are a cache group.
    pub fn kv_layout(&self, dtype: Dtype) -> KvLayout {
        let layer = |layer: &LayerSpec| match &layer.mixer {
            MixerSpec::Attention(AttentionSpec { kv_heads, head_dim, window, .. }) => {
                let rows = (*kv_heads, *head_dim);
                Some((window.map_or(GroupKind::Full, |window| GroupKind::Window(window.tokens())), rows, rows))
            }
            // Values are a part of keys.
            MixerSpec::Latent(spec) => Some((GroupKind::Full, (1, spec.key_width()), (0, 0))),
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
            Self::AsStored if weights.contains(&format!("{}.weight", head_path(weights))) => Self::Own,
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

/// What checkpoints call the output head; the second one is MLX's name in `llama4_text`.
const HEADS: [&str; 2] = ["lm_head", "output"];

/// Where the output head of a model is whose tensors are `weights`.
fn head_path(weights: &Weights) -> String {
    let path = |name: &str| format!("{}{name}", prefixes(weights).1);
    let stored = HEADS.into_iter().map(path).find(|path| weights.contains(&format!("{path}.weight")));
    stored.unwrap_or_else(|| path(HEADS[0]))
}

impl Decoder {
    /// Takes all weights that `spec` describes.
    pub fn load(weights: &mut Weights, spec: &DecoderSpec) -> Result<Self> {
        let (hidden, head) = (spec.hidden, spec.head.decided(weights));
        let (prefix, head_path) = (prefixes(weights).0, head_path(weights));
        if spec.wrapped {
            weights.discard(|name| !name.starts_with(prefix) && !name.starts_with(&format!("{head_path}.")));
        }
        if spec.predicts_ahead {
            let layer =
                |name: &str| name.strip_prefix(prefix)?.strip_prefix("layers.")?.split('.').next()?.parse().ok();
            let behind = |name: &str| layer(name).is_some_and(|layer: usize| layer >= spec.layers.len());
            weights.discard(|name| name.starts_with("mtp.") || behind(name));
        }
        // Of what is left: the layers that draw ahead may be stored otherwise.
        let spec = &spec.centred(weights);
        // Old exports carry the rotary tables, and some tied models a copy of their head.
        let tied = head == OutputHead::Tied;
        weights.discard(|name| {
            name.ends_with("rotary_emb.inv_freq") || (tied && name.starts_with(&format!("{head_path}.")))
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

    /// Rows `[n, hidden]` of the embedding table for `ids [n]` (u32), as they are stored: those of the output head if that is tied.
    pub fn table_rows(&self, ids: &Array) -> Result<Array> {
        self.embedding.forward(ids)
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
