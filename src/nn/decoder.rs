//! The decoder-only transformer that dense models share: what differs between them is a [`DecoderSpec`].

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::Array;

use super::{Attention, AttentionSpec, Embedding, Gathers, Linear, PagedIndex, RmsNorm, RopeSpec, SwiGlu};
use crate::cache::{GroupKind, KvLayout, Pages};
use crate::error::{Error, Result};
use crate::kernels::Placement;
use crate::weights::Weights;

/// Which tokens of which sequences pass layers together, and the pools that they extend.
pub struct Step<'a> {
    /// Positions in their sequences `[T]`, i32.
    pub positions: &'a Array,
    /// Keys and values so far; the step adds its own.
    pub pages: &'a mut Pages,
    /// Where the rows belong.
    pub placement: Arc<Placement>,
    /// The same for MLX's operations.
    pub gathers: Gathers,
    /// The same for GPU kernels.
    pub paged: PagedIndex,
    /// Computed after the newest writes to the pools that attention has read.
    pub written: Option<Array>,
    /// To be evaluated with the step: the writes that nothing in it reads.
    pub unread: Vec<Array>,
    /// Receives each layer's output `[T, hidden]` when set (parity tests).
    pub trace: Option<&'a mut Vec<Array>>,
}

impl<'a> Step<'a> {
    /// Tokens at `positions [T]`.
    pub fn new(positions: &'a Array, pages: &'a mut Pages, placement: Arc<Placement>) -> Self {
        let gathers = Gathers::new(&placement, pages.block_tokens());
        let paged = PagedIndex::new(&placement, pages.block_tokens());
        Self { positions, pages, placement, gathers, paged, written: None, unread: Vec::new(), trace: None }
    }
}

/// A dense decoder as its architecture declares it.
#[derive(Debug, Clone)]
pub struct DecoderSpec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Where logits come from.
    pub head: OutputHead,
    /// What precedes the names of all tensors but the head's.
    pub prefix: &'static str,
    /// Positions the engine serves.
    pub context: usize,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
}

/// What makes logits of the last hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputHead {
    /// The embedding table.
    Tied,
    /// A matrix of its own.
    Own,
    /// Nothing: hidden states are all that is wanted.
    None,
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// Width inside the feed-forward layer.
    pub mlp: usize,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
}

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: SwiGlu,
}

/// A loaded dense decoder, with the tensor names of Hugging Face's Llama family.
#[derive(Debug)]
pub struct Decoder {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// Without it the embedding table, if there are logits at all.
    own_head: Option<Linear>,
    head: OutputHead,
    layout: KvLayout,
}

impl Decoder {
    /// Takes all weights that `spec` describes.
    pub fn load(weights: &mut Weights, spec: &DecoderSpec) -> Result<Self> {
        let DecoderSpec { hidden, prefix, head, .. } = *spec;
        // Old exports carry the rotary tables, and some tied models a copy of their head.
        let tied = head == OutputHead::Tied;
        weights.discard(|name| name.ends_with("rotary_emb.inv_freq") || (tied && name.starts_with("lm_head.")));
        let embedding = Embedding::load(weights, &format!("{prefix}embed_tokens"), spec.vocab, hidden)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (index, layer) in spec.layers.iter().enumerate() {
            let path = format!("{prefix}layers.{index}");
            let rope = spec.rope.build(layer.attention.head_dim, spec.context)?;
            let norm = |weights: &mut Weights, name: &str| {
                RmsNorm::load(weights, &format!("{path}.{name}"), hidden, spec.norm_eps)
            };
            layers.push(Layer {
                attention_norm: norm(weights, "input_layernorm")?,
                attention: Attention::load(
                    weights,
                    &format!("{path}.self_attn"),
                    hidden,
                    index,
                    &layer.attention,
                    rope,
                )?,
                mlp_norm: norm(weights, "post_attention_layernorm")?,
                mlp: SwiGlu::load(weights, &format!("{path}.mlp"), hidden, layer.mlp, layer.mlp_bias)?,
            });
        }
        let norm = RmsNorm::load(weights, &format!("{prefix}norm"), hidden, spec.norm_eps)?;
        let own_head = (head == OutputHead::Own).then(|| Linear::load(weights, "lm_head", hidden, spec.vocab, false));
        let layers_kv = spec.layers.iter().map(|l| (l.attention.kv_heads, l.attention.head_dim)).collect();
        let layout = KvLayout { groups: vec![GroupKind::Full], layers: layers_kv, dtype: weights.float_type() };
        Ok(Self { embedding, layers, norm, own_head: own_head.transpose()?, head, layout })
    }

    /// What a token keeps.
    pub fn kv_layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What the first layer takes of `tokens [T]` (u32): `[T, hidden]`.
    pub fn embed(&self, tokens: &Array) -> Result<Array> {
        self.embedding.forward(tokens)
    }

    /// Runs some of the layers over the step's tokens: `x [T, hidden]` before the first of them, the same shape behind the
    /// last.
    pub fn pass(&self, mut x: Array, layers: Range<usize>, step: &mut Step<'_>) -> Result<Array> {
        for layer in &self.layers[layers] {
            x = layer.attention.forward_onto(&x, &layer.attention_norm, step)?;
            x = layer.mlp.forward_onto(&x, &layer.mlp_norm)?;
            if let Some(trace) = step.trace.as_deref_mut() {
                trace.push(x.clone());
            }
        }
        Ok(x)
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
        match (&self.own_head, self.head) {
            (Some(head), _) => head.forward(&normed),
            (None, OutputHead::None) => Err(Error::internal("this model was loaded without its output head")),
            (None, _) => self.embedding.as_head(&normed),
        }
    }
}
