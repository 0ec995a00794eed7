//! Attention of layers that have no keys and values of their own but read those of an earlier layer (Brandon et al. 2024, "Reducing
//! Transformer Key-Value Cache Size with Cross-Layer Attention"): nothing of such a layer is cached.

use mlx_rs::Array;

use super::attention::{AttentionCore, CoreSpec};
use super::linear::Joined;
use super::{AttentionSpec, Linear, MixerSpec, Norm, NormOver, RmsNorm, Rope, Step};
use crate::error::{Error, Result};
use crate::weights::Weights;

/// What an architecture declares about a layer that reads another one's keys and values.
#[derive(Debug, Clone)]
pub struct CrossLayerSpec {
    /// Index of that layer, an earlier one, among all layers.
    pub source: usize,
    /// What the layer's attention is like; heads and window are those of the other one.
    pub attention: AttentionSpec,
}

impl CrossLayerSpec {
    /// Numbers of a row that are alive in the layer at the same time.
    pub fn row_numbers(&self) -> usize {
        2 * self.attention.heads * self.attention.head_dim
    }

    /// An error unless the rows of `source`, the mixer of that layer, are what this layer's queries can be compared with.
    fn check(&self, source: Option<&MixerSpec>) -> Result<()> {
        let AttentionSpec { fused, gated, sinks, ref position_scale, qk_norm, .. } = self.attention;
        let over_tokens = qk_norm.is_some_and(|norm| norm.over == NormOver::Token);
        if fused || gated || sinks || over_tokens || position_scale.is_some() {
            return Err(Error::internal("this kind of attention cannot read another layer's keys"));
        }
        let shape = |spec: &AttentionSpec| (spec.heads, spec.kv_heads, spec.head_dim, spec.window);
        match source {
            Some(MixerSpec::Attention(source)) if shape(source) == shape(&self.attention) => Ok(()),
            _ => Err(Error::internal(format!("layer {} has no keys for other layers", self.source))),
        }
    }
}

/// A layer's attention over the keys and values of another one.
#[derive(Debug)]
pub struct CrossLayerAttention {
    query: Joined,
    output: Linear,
    core: AttentionCore,
}

impl CrossLayerAttention {
    /// Takes `q_proj`, `o_proj` and the norm of queries under `path`, and leaves out projections and norm of keys and values, which
    /// some checkpoints have in vain. The other layer is `source`, at `place` in the cache; `context` are the tokens that are served.
    pub fn load(
        weights: &mut Weights,
        path: &str,
        hidden: usize,
        (source, place): (Option<&MixerSpec>, usize),
        spec: &CrossLayerSpec,
        context: usize,
    ) -> Result<Self> {
        spec.check(source)?;
        let attention = &spec.attention;
        let name = |part: &str| format!("{path}.{part}");
        let mut unused = vec![name("k_proj."), name("v_proj.")];
        let norm_names = attention.qk_norm.and_then(|norm| norm.names);
        unused.extend(norm_names.map(|[_, key]| name(&format!("{key}."))));
        weights.discard(|tensor| unused.iter().any(|unused| tensor.starts_with(unused)));
        let width = attention.heads * attention.head_dim;
        let query = Linear::load(weights, &name("q_proj"), hidden, width, attention.qkv_bias)?;
        let output = Linear::load(weights, &name(attention.output_name), width, hidden, attention.output_bias)?;
        let norms = attention.qk_norm.map(|norm| -> Result<[RmsNorm; 2]> {
            let width = attention.head_dim;
            let Some([query, _]) = norm.names else {
                let norm = RmsNorm::plain(weights, width, norm.eps)?;
                return Ok([norm.clone(), norm]);
            };
            match Norm::load(weights, &name(query), width, norm.kind, norm.eps)? {
                // That of keys is never asked for.
                Norm::Rms(norm) => Ok([norm.clone(), norm]),
                Norm::Layer(_) => Err(Error::internal("layer norms of heads")),
            }
        });
        let rope = match &attention.rope {
            Some((rope, dims)) => rope.build(*dims, context)?,
            None => Rope::none(),
        };
        let core = CoreSpec {
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            key_width: attention.head_dim,
            value_width: attention.head_dim,
            values_in_keys: false,
            scale: attention.scale,
            window: attention.window,
            soft_cap: attention.soft_cap,
            turned_first: attention.qk_norm.is_some_and(|norm| norm.over == NormOver::TurnedHead),
            value_norm: None,
        };
        let core = AttentionCore::new(weights, place, core, norms.transpose()?, rope, None)?;
        Ok(Self { query: Joined::new(vec![query])?, output, core })
    }

    /// `attention(x)`, or `attention(norm(x))`, added to `residual` if there is one; all `[T, hidden]`. The other layer has appended
    /// the step's keys and values before.
    pub fn forward(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        residual: Option<&Array>,
        step: &mut Step<'_>,
    ) -> Result<Array> {
        let queries = self.query.forward(x, norm)?;
        self.output.forward_to(&self.core.forward_over(&queries, step)?, residual)
    }
}
