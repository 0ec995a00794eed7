//! Mixtures of experts: feed-forward layers of which each token passes a few (Shazeer et al. 2017, "Outrageously Large Neural
//! Networks").

use mlx_rs::{Array, ops};

use super::linear::Joined;
use super::mlp::load_gated;
use super::router::Router;
use super::{Activation, Linear, RmsNorm, RouterSpec};
use crate::error::{Error, Result};
use crate::kernels::{Backend, Cpu, ExpertActivation, ExpertOperands, Operand, SharedOperands};
use crate::mlx;
use crate::weights::{ExpertShape, ExpertStacks, PROJECTIONS, Stack, Weights};

/// What an architecture declares about its experts. Names are parts of paths, below that of the layer.
#[derive(Debug, Clone)]
pub struct ExpertsSpec {
    /// How many there are.
    pub experts: usize,
    /// How many a token passes.
    pub per_token: usize,
    /// Width inside of one.
    pub inner: usize,
    /// Whether they have biases.
    pub bias: bool,
    /// Between their matrices; whether there is a gate.
    pub activation: ExpertActivation,
    /// What chooses them.
    pub router: RouterSpec,
    /// Narrower rows than those of the residual stream, which they compute in.
    pub latent: Option<LatentExpertsSpec>,
    /// Whether a token's weights multiply what experts take instead of what they give (Llama 4).
    pub weighs_input: bool,
    /// Experts that all tokens pass.
    pub shared: Option<SharedSpec>,
    /// What MLX's tools put before the names of stacked projections.
    pub stacked: &'static str,
    /// What they call gate, up and down.
    pub projections: [&'static str; 3],
    /// Whether Hugging Face's joined tensors are `[experts, input, output]` (Llama 4).
    pub transposed: bool,
}

/// What an architecture declares about the narrower rows of experts: one projection before all of them, one behind their weighted sum.
/// The router and the experts that all tokens pass take the rows as they are (Nemotron 3, "LatentMoE").
#[derive(Debug, Clone)]
pub struct LatentExpertsSpec {
    /// Width of the narrower rows.
    pub width: usize,
    /// Whether the projections have biases.
    pub bias: bool,
    /// What checkpoints call them.
    pub names: [&'static str; 2],
}

/// What an architecture declares about experts that all tokens pass: one feed-forward layer with the experts' activation.
#[derive(Debug, Clone)]
pub struct SharedSpec {
    /// Where `gate_proj`, `up_proj` and `down_proj` are.
    pub path: &'static str,
    /// Whether that is a part of the path of the decoder's layer, beside that of the experts instead of below it (Granite 4).
    pub beside: bool,
    /// What checkpoints call the one matrix of gate and up, and down beside it, where they have these instead.
    pub joined: Option<[&'static str; 2]>,
    /// Width inside.
    pub inner: usize,
    /// Whether they have biases.
    pub bias: bool,
    /// A projection to one number, whose sigmoid multiplies what they give.
    pub gate: Option<&'static str>,
}

impl SharedSpec {
    /// Without biases and gate, by the usual names.
    pub fn new(path: &'static str, inner: usize) -> Self {
        Self { path, beside: false, joined: None, inner, bias: false, gate: None }
    }
}

impl ExpertsSpec {
    /// Gated experts without biases by the usual names; the rest is to be set.
    pub fn new(experts: usize, per_token: usize, inner: usize, router: RouterSpec) -> Self {
        Self {
            experts,
            per_token,
            inner,
            bias: false,
            activation: ExpertActivation::SwiGlu,
            router,
            latent: None,
            weighs_input: false,
            shared: None,
            stacked: "switch_mlp",
            projections: PROJECTIONS,
            transposed: false,
        }
    }

    /// Numbers of a row that are alive in a layer at the same time, at most, for what an engine plans. (The CPU kernels need less for
    /// long prompts: they compute about a thousand rows of experts at once.)
    pub fn row_numbers(&self, hidden: usize) -> usize {
        let shared = self.shared.as_ref().map_or(0, |shared| 2 * shared.inner + hidden);
        let latent = self.latent.as_ref().map_or(0, |latent| 2 * latent.width);
        self.experts + self.per_token * (2 * self.width(hidden) + 2 * self.inner) + shared + latent
    }

    /// Of the rows that experts take, where those of the residual stream have `hidden` columns.
    fn width(&self, hidden: usize) -> usize {
        self.latent.as_ref().map_or(hidden, |latent| latent.width)
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::invalid_model(format!("config.json: {what}")));
        let Self { experts, per_token, inner, .. } = *self;
        if experts == 0 || per_token == 0 || per_token > experts || inner == 0 {
            return wrong(format!("{per_token} of {experts} experts of width {inner}"));
        }
        if self.width(1) == 0 {
            return wrong("experts of rows of width 0".to_owned());
        }
        if u32::try_from(experts).is_err() {
            return wrong(format!("{experts} experts"));
        }
        if let Some(groups) = self.router.groups
            && (groups.count == 0
                || !experts.is_multiple_of(groups.count)
                || groups.kept == 0
                || groups.kept > groups.count
                || groups.kept * (experts / groups.count) < per_token)
        {
            return wrong(format!("{per_token} of {experts} experts in {} of {} groups", groups.kept, groups.count));
        }
        Ok(())
    }
}

/// From this many rows of experts on MLX multiplies them in the order of the experts (mlx-lm, `switch_layers.py`).
const SORTED_FROM: usize = 64;

/// A loaded mixture of experts.
#[derive(Debug)]
pub struct Experts {
    router: Router,
    stacks: ExpertStacks,
    /// To narrower rows and back.
    latent: Option<[Linear; 2]>,
    shared: Option<Shared>,
    activation: ExpertActivation,
    weighs_input: bool,
    backend: Backend,
}

#[derive(Debug)]
struct Shared {
    input: Joined,
    output: Linear,
    gate: Option<Linear>,
}

impl Experts {
    /// Takes the router, the experts and what is shared, under `path`, for rows of width `hidden`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, spec: &ExpertsSpec) -> Result<Self> {
        spec.check()?;
        let router = Router::load(weights, path, hidden, (spec.experts, spec.per_token), &spec.router)?;
        let shape = ExpertShape {
            count: spec.experts,
            columns: spec.width(hidden),
            inner: spec.inner,
            gated: spec.activation.is_gated(),
            bias: spec.bias,
            stacked: spec.stacked,
            projections: spec.projections,
            transposed: spec.transposed,
        };
        let stacks = weights.experts(path, &shape)?;
        let latent = match &spec.latent {
            None => None,
            Some(LatentExpertsSpec { width, bias, names: [narrow, wide] }) => Some([
                Linear::load(weights, &format!("{path}.{narrow}"), hidden, *width, *bias)?,
                Linear::load(weights, &format!("{path}.{wide}"), *width, hidden, *bias)?,
            ]),
        };
        let shared = spec.shared.as_ref().map(|shared| Shared::load(weights, path, hidden, shared, shape.gated));
        Ok(Self {
            router,
            stacks,
            latent,
            shared: shared.transpose()?,
            activation: spec.activation,
            weighs_input: spec.weighs_input,
            backend: weights.backend().clone(),
        })
    }

    /// `experts(x)`, or `experts(norm(x))`, added to `residual` if there is one; all `[T, hidden]`.
    pub fn forward(&self, x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>) -> Result<Array> {
        self.forward_routed(x, norm, None, residual)
    }

    /// The same, but the router reads `routed_by [T, hidden]` as it is, if that is given.
    pub fn forward_routed(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        routed_by: Option<&Array>,
        residual: Option<&Array>,
    ) -> Result<Array> {
        if let Some(cpu) = self.kernels() {
            return cpu.experts(x, norm.map(RmsNorm::parts), routed_by, &self.operands(), residual);
        }
        let normed = norm.map(|norm| norm.forward(x)).transpose()?;
        let x = normed.as_ref().unwrap_or(x);
        let by = routed_by.unwrap_or(x);
        let mut y = match &self.latent {
            None => self.chosen(x, by)?,
            Some([narrow, wide]) => wide.forward(&self.chosen(&narrow.forward(x)?, by)?)?,
        };
        if let Some(shared) = &self.shared {
            y = y.add(shared.forward(x, self.activation)?)?;
        }
        match residual {
            Some(residual) => Ok(residual.add(y)?),
            None => Ok(y),
        }
    }

    /// The kernels, if all of it can be computed by them.
    fn kernels(&self) -> Option<&Cpu> {
        let operands = self.operands();
        let shared =
            operands.shared.iter().flat_map(|shared| shared.inputs.iter().chain([&shared.output]).chain(&shared.gate));
        let own = operands.inputs.iter().chain([&operands.output, &operands.router.projection]);
        let mut all = own.chain(operands.latent.iter().flatten()).chain(shared);
        all.all(|operand| self.backend.kernels(operand.matrix).is_some())
            .then(|| self.backend.kernels(&self.stacks.output.matrix))
            .flatten()
    }

    fn operands(&self) -> ExpertOperands<'_> {
        ExpertOperands {
            router: self.router.operands(),
            inputs: self.stacks.inputs.iter().map(operand).collect(),
            output: operand(&self.stacks.output),
            activation: self.activation,
            weighs_input: self.weighs_input,
            latent: self.latent.as_ref().map(|both| both.each_ref().map(Linear::operand)),
            shared: self.shared.as_ref().map(|shared| SharedOperands {
                inputs: shared.input.operands(),
                output: shared.output.operand(),
                gate: shared.gate.as_ref().map(Linear::operand),
            }),
        }
    }

    /// What the chosen experts give of `x [T, hidden]`, by MLX's operations.
    fn chosen(&self, x: &Array, routed_by: &Array) -> Result<Array> {
        let (experts, weights) = self.router.choose(routed_by)?;
        let (tokens, hidden, per_token) = (x.dim(0), x.dim(1), self.router.per_token() as i32);
        let rows = tokens * per_token;
        // Rows for [`mlx::Matrix::gather_matmul`]: `[T, 1 or per_token, 1, hidden]`, or `[T * per_token, 1, hidden]` in order.
        let mut x = x.reshape(&[tokens, 1, 1, hidden])?;
        if self.weighs_input {
            let weights = weights.reshape(&[tokens, per_token, 1, 1])?.as_dtype(x.dtype())?;
            x = x.multiply(weights)?;
        }
        let order = if rows as usize >= SORTED_FROM {
            let order = ops::argsort(experts.reshape(&[rows])?)?;
            let places = if self.weighs_input {
                order.clone()
            } else {
                order.floor_divide(Array::from_slice(&[per_token as u32], &[1]))?
            };
            x = x.reshape(&[-1, 1, hidden])?.take_axis(places, 0)?;
            Some(order)
        } else {
            None
        };
        let experts = match &order {
            Some(order) => experts.reshape(&[rows])?.take_axis(order, 0)?,
            None => experts,
        };
        let sorted = order.is_some();
        let inputs = self.stacks.inputs.iter().map(|stack| gathered(stack, &x, &experts, sorted));
        let inner = activate(self.activation, &inputs.collect::<Result<Vec<_>>>()?)?;
        let mut y = gathered(&self.stacks.output, &inner, &experts, sorted)?;
        if let Some(order) = order {
            y = y.take_axis(ops::argsort(order)?, 0)?;
        }
        let y = y.reshape(&[tokens, per_token, -1])?;
        if self.weighs_input {
            return Ok(y.sum_axis(1, false)?);
        }
        let weighted = y.multiply(weights.reshape(&[tokens, per_token, 1])?)?;
        Ok(weighted.sum_axis(1, false)?.as_dtype(y.dtype())?)
    }
}

impl Shared {
    fn load(weights: &mut Weights, path: &str, hidden: usize, spec: &SharedSpec, gated: bool) -> Result<Self> {
        let SharedSpec { path: part, beside, joined, inner, bias, gate } = *spec;
        let own = match (beside, path.rsplit_once('.')) {
            (false, _) => format!("{path}.{part}"),
            (true, Some((parent, _))) => format!("{parent}.{part}"),
            (true, None) => part.to_owned(),
        };
        let (inputs, output) = if gated {
            let (inputs, output) = load_gated(weights, &own, (hidden, inner), bias, PROJECTIONS, joined)?;
            (inputs.into(), output)
        } else {
            let [_, up, down] = PROJECTIONS.map(|name| format!("{own}.{name}"));
            let input = Linear::load(weights, &up, hidden, inner, bias)?;
            (vec![input], Linear::load(weights, &down, inner, hidden, bias)?)
        };
        let gate = gate.map(|gate| Linear::load(weights, &format!("{path}.{gate}"), hidden, 1, false)).transpose()?;
        Ok(Self { input: Joined::new(inputs)?, output, gate })
    }

    /// By MLX's operations.
    fn forward(&self, x: &Array, activation: ExpertActivation) -> Result<Array> {
        let inner = self.input.project(x)?;
        let width = inner.dim(1) as usize;
        let inner = if activation.is_gated() {
            [(0, width / 2), (width / 2, width)]
                .map(|(from, to)| mlx::columns(&inner, from, to))
                .into_iter()
                .collect::<Result<Vec<_>>>()?
        } else {
            vec![inner]
        };
        let y = self.output.forward(&activate(activation, &inner)?)?;
        match &self.gate {
            Some(gate) => Ok(ops::sigmoid(gate.forward(x)?)?.multiply(y)?),
            None => Ok(y),
        }
    }
}

fn operand(stack: &Stack) -> Operand<'_> {
    Operand { matrix: (&stack.matrix).into(), bias: stack.bias.as_ref() }
}

/// Products with a stack, and its biases.
fn gathered(stack: &Stack, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
    let y = stack.matrix.gather_matmul(x, experts, sorted)?;
    match &stack.bias {
        Some(bias) => Ok(y.add(bias.take_axis(experts, 0)?.expand_dims(-2)?)?),
        None => Ok(y),
    }
}

/// Of gate and up, or of up alone. Composed by hand: the activations of mlx-rs use MLX's compile.
fn activate(activation: ExpertActivation, inputs: &[Array]) -> Result<Array> {
    let number = |x: f32| -> Result<Array> { Ok(Array::from_f32(x).as_dtype(inputs[0].dtype())?) };
    match (activation, inputs) {
        (ExpertActivation::SwiGlu, [gate, up]) => Ok(gate.multiply(ops::sigmoid(gate)?)?.multiply(up)?),
        (ExpertActivation::GeGlu, [gate, up]) => Ok(Activation::GeluTanh.forward(gate)?.multiply(up)?),
        (ExpertActivation::ClampedSwiGlu { alpha, limit }, [gate, up]) => {
            let gate = ops::minimum(gate, number(limit)?)?;
            let up = ops::minimum(ops::maximum(up, number(-limit)?)?, number(limit)?)?;
            let gate = gate.multiply(ops::sigmoid(gate.multiply(number(alpha)?)?)?)?;
            Ok(up.add(number(1.0)?)?.multiply(gate)?)
        }
        (ExpertActivation::SquaredRelu, [up]) => Ok(ops::maximum(up, number(0.0)?)?.square()?),
        _ => Err(Error::internal("experts with another number of matrices than their activation takes")),
    }
}

#[cfg(test)]
mod tests;
