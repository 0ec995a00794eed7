//! A mixture of experts as one node of MLX's graph, by the CPU kernels.

use mlx_rs::{Array, Dtype};

use super::cpu::experts::Experts;
use super::cpu::floats::FloatsMut;
use super::cpu::matmul::{Finish, MatMul, Precision, Projection};
use super::cpu::routing::{Chosen, Routing};
use super::node::{CpuKernel, Input, Output, node};
use super::ops::{Cpu, MatrixLayout, NormLayout, NormOf, Operand, last};
use crate::error::{Error, Result};

/// What is between the matrices of an expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExpertActivation {
    /// `silu(gate) * up` (Shazeer 2020, "GLU Variants Improve Transformer").
    SwiGlu,
    /// `gelu(gate) * up` with the approximation by `tanh` (the same paper; Gemma).
    GeGlu,
    /// `(up + 1) * gate * sigmoid(alpha * gate)`, the gate at most `limit` and `up` between `-limit` and `limit` (gpt-oss).
    ClampedSwiGlu {
        /// Steepness of the gate.
        alpha: f32,
        /// Bound of both.
        limit: f32,
    },
    /// The square of the positive part, without a gate (So et al. 2021, "Primer"; Nemotron-H).
    SquaredRelu,
}

impl ExpertActivation {
    /// Whether there is a gate.
    pub fn is_gated(self) -> bool {
        self != Self::SquaredRelu
    }

    fn finish(self) -> Finish<'static> {
        match self {
            Self::SwiGlu => Finish::SwiGlu,
            Self::GeGlu => Finish::GeGlu,
            Self::ClampedSwiGlu { alpha, limit } => Finish::ClampedSwiGlu { alpha, limit },
            Self::SquaredRelu => Finish::SquaredRelu,
        }
    }
}

/// What chooses experts.
#[derive(Debug, Clone, Copy)]
pub struct RouterOperands<'a> {
    /// Before the projection; it replaces the norm of the layer.
    pub norm: Option<NormOf<'a>>,
    /// To the logits of experts.
    pub projection: Operand<'a>,
    /// Added to what experts are chosen by, `[experts]`.
    pub correction: Option<&'a Array>,
    /// Multiply the weights of experts, `[experts]`.
    pub expert_scales: Option<&'a Array>,
    /// The rule.
    pub routing: &'a Routing,
}

/// Matrices that all tokens pass.
#[derive(Debug, Clone)]
pub struct SharedOperands<'a> {
    /// Gate and up, or up alone.
    pub inputs: Vec<Operand<'a>>,
    /// Down.
    pub output: Operand<'a>,
    /// One row, whose product's sigmoid multiplies what they give.
    pub gate: Option<Operand<'a>>,
}

/// A mixture of experts.
#[derive(Debug, Clone)]
pub struct ExpertOperands<'a> {
    /// What chooses.
    pub router: RouterOperands<'a>,
    /// Stacks `[experts, inner, columns]`, with biases `[experts, inner]`: gate and up, or up alone.
    pub inputs: Vec<Operand<'a>>,
    /// Down: a stack `[experts, columns, inner]`, with biases `[experts, columns]`.
    pub output: Operand<'a>,
    /// Between them, also of the shared ones.
    pub activation: ExpertActivation,
    /// Whether weights multiply what experts take instead of what they give.
    pub weighs_input: bool,
    /// Before the stacks, to rows of their width, and behind the sum of what they give.
    pub latent: Option<[Operand<'a>; 2]>,
    /// What all tokens pass.
    pub shared: Option<SharedOperands<'a>>,
}

impl Cpu {
    /// What the experts give that tokens have chosen, weighted and added, and the shared ones: of the rows of
    /// `x [T, columns]`, normalised before if there is a norm. `[T, width]` f32, added to `residual` if there is one.
    ///
    /// The router reads `routed_by [T, ..]` if that is given, as it is; otherwise what experts read.
    pub fn experts(
        &self,
        x: &Array,
        norm: Option<NormOf<'_>>,
        routed_by: Option<&Array>,
        layer: &ExpertOperands<'_>,
        residual: Option<&Array>,
    ) -> Result<Array> {
        let mut inputs = vec![x];
        let mut push = |array| {
            inputs.push(array);
            inputs.len() - 1
        };
        let (routed_by, residual) = (routed_by.map(&mut push), residual.map(&mut push));
        let RouterOperands { norm: router_norm, projection, correction, expert_scales, routing } = layer.router;
        let (correction, expert_scales) = (correction.map(&mut push), expert_scales.map(&mut push));
        let norm = norm.map(|norm| NormLayout::new(norm, &mut inputs));
        let router_norm = router_norm.map(|norm| NormLayout::new(norm, &mut inputs));
        let router = MatrixLayout::new(&projection, &mut inputs)?;
        let layouts = layouts(&layer.inputs, &mut inputs)?;
        let output = MatrixLayout::new(&layer.output, &mut inputs)?;
        let latent = match &layer.latent {
            None => None,
            Some([narrow, wide]) => {
                Some([MatrixLayout::new(narrow, &mut inputs)?, MatrixLayout::new(wide, &mut inputs)?])
            }
        };
        let shared = match &layer.shared {
            None => None,
            Some(shared) => Some(SharedLayout {
                inputs: self::layouts(&shared.inputs, &mut inputs)?,
                output: MatrixLayout::new(&shared.output, &mut inputs)?,
                gate: shared.gate.map(|gate| MatrixLayout::new(&gate, &mut inputs)).transpose()?,
            }),
        };
        let width = latent.as_ref().map_or(output.rows, |[_, wide]| wide.rows);
        let shape = [x.dim(0), width as i32];
        let kernel = Mixture {
            cpu: self.clone(),
            norm,
            routed_by,
            residual,
            router_norm,
            router,
            correction,
            expert_scales,
            routing: *routing,
            inputs: layouts,
            output,
            activation: layer.activation,
            weighs_input: layer.weighs_input,
            latent,
            shared,
            width,
        };
        node(kernel, &inputs, &shape, Dtype::Float32)
    }
}

impl Cpu {
    /// Rows `x [rows, columns]`, each times one of the `stacked` matrices of a stack `[stacked, width, columns]`: `which [rows]`, in
    /// which rows of the same matrix should be neighbours. `[rows, width]` f32.
    pub fn stacked_linear(&self, x: &Array, which: Vec<u32>, stacked: usize, operand: &Operand<'_>) -> Result<Array> {
        let mut inputs = vec![x];
        let layout = MatrixLayout::new(operand, &mut inputs)?;
        let shape = [x.dim(0), layout.rows as i32];
        node(Stacked { cpu: self.clone(), layout, which, stacked }, &inputs, &shape, Dtype::Float32)
    }
}

struct Stacked {
    cpu: Cpu,
    layout: MatrixLayout,
    which: Vec<u32>,
    stacked: usize,
}

impl CpuKernel for Stacked {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let (x, projections) = (inputs[0].to_f32()?, [self.layout.read(inputs)?]);
        let (experts, stacked, precision) = (Some(&self.which[..]), self.stacked, self.cpu.precision);
        let product = MatMul { x: &x, projections: &projections, experts, stacked, finish: Finish::Concat, precision };
        product.run(self.cpu.isa, &self.cpu.workers, last(&mut outputs)?);
        Ok(())
    }
}

struct SharedLayout {
    inputs: Vec<MatrixLayout>,
    output: MatrixLayout,
    gate: Option<MatrixLayout>,
}

/// Numbers are places among the node's inputs.
struct Mixture {
    cpu: Cpu,
    norm: Option<NormLayout>,
    routed_by: Option<usize>,
    residual: Option<usize>,
    router_norm: Option<NormLayout>,
    router: MatrixLayout,
    correction: Option<usize>,
    expert_scales: Option<usize>,
    routing: Routing,
    inputs: Vec<MatrixLayout>,
    output: MatrixLayout,
    activation: ExpertActivation,
    weighs_input: bool,
    latent: Option<[MatrixLayout; 2]>,
    shared: Option<SharedLayout>,
    /// Of the output.
    width: usize,
}

impl CpuKernel for Mixture {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let Some(FloatsMut::F32(out)) = outputs.pop().map(Output::into_floats).transpose()? else {
            return Err(Error::internal("a mixture of experts gives f32"));
        };
        let cpu = &self.cpu;
        let x = inputs[0].to_f32()?;
        let x = self.normed(self.norm, &x, inputs)?.map_or(x, Into::into);
        let chosen = self.route(&x, inputs)?;
        let projections = read(&self.inputs, inputs)?;
        let experts = Experts {
            count: self.routing.experts,
            inputs: &projections,
            finish: self.activation.finish(),
            output: self.output.read(inputs)?,
            weighs_input: self.weighs_input,
            precision: cpu.precision,
        };
        match &self.latent {
            None => {
                out.fill(0.0);
                experts.run(cpu.isa, &cpu.workers, &x, &chosen, out);
            }
            Some([narrow, wide]) => {
                let taken = self.product(&x, &[narrow.read(inputs)?], Finish::Concat, cpu.precision);
                let mut given = vec![0f32; taken.len()];
                experts.run(cpu.isa, &cpu.workers, &taken, &chosen, &mut given);
                out.copy_from_slice(&self.product(&given, &[wide.read(inputs)?], Finish::Concat, cpu.precision));
            }
        }
        if let Some(shared) = &self.shared {
            self.add_shared(shared, &x, inputs, out)?;
        }
        if let Some(residual) = self.residual {
            let residual = inputs[residual].to_f32()?;
            out.iter_mut().zip(residual.iter()).for_each(|(out, x)| *out += x);
        }
        Ok(())
    }
}

impl Mixture {
    fn normed(&self, norm: Option<NormLayout>, x: &[f32], inputs: &[Input<'_>]) -> Result<Option<Vec<f32>>> {
        let Some(norm) = norm else { return Ok(None) };
        let mut normed = vec![0f32; x.len()];
        norm.read(inputs)?.run(self.cpu.isa, &self.cpu.workers, x, FloatsMut::F32(&mut normed));
        Ok(Some(normed))
    }

    /// A product with what `finish` makes of it; `out` is f32.
    fn product(&self, x: &[f32], projections: &[Projection<'_>], finish: Finish<'_>, precision: Precision) -> Vec<f32> {
        let product = MatMul { x, projections, experts: None, stacked: 1, finish, precision };
        let mut out = vec![0f32; product.rows() * product.width()];
        product.run(self.cpu.isa, &self.cpu.workers, FloatsMut::F32(&mut out));
        out
    }

    /// Logits are computed exactly in any precision: an expert that is not chosen is more than a small error.
    fn route(&self, x: &[f32], inputs: &[Input<'_>]) -> Result<Chosen> {
        let by = self.routed_by.map(|at| inputs[at].to_f32()).transpose()?;
        let by = by.as_deref().unwrap_or(x);
        let normed = self.normed(self.router_norm, by, inputs)?;
        let by = normed.as_deref().unwrap_or(by);
        let logits = self.product(by, &[self.router.read(inputs)?], Finish::Concat, Precision::Exact);
        let numbers = |at: Option<usize>| at.map(|at| inputs[at].to_f32()).transpose();
        let (correction, scales) = (numbers(self.correction)?, numbers(self.expert_scales)?);
        Ok(self.routing.run(&self.cpu.workers, &logits, correction.as_deref(), scales.as_deref()))
    }

    fn add_shared(&self, shared: &SharedLayout, x: &[f32], inputs: &[Input<'_>], out: &mut [f32]) -> Result<()> {
        let precision = self.cpu.precision;
        let inner = self.product(x, &read(&shared.inputs, inputs)?, self.activation.finish(), precision);
        let y = self.product(&inner, &[shared.output.read(inputs)?], Finish::Concat, precision);
        let gates = match &shared.gate {
            Some(gate) => self.product(x, &[gate.read(inputs)?], Finish::Concat, Precision::Exact),
            None => Vec::new(),
        };
        let width = self.width.max(1);
        for (row, (out, y)) in out.chunks_exact_mut(width).zip(y.chunks_exact(width)).enumerate() {
            let gate = gates.get(row).map_or(1.0, |gate| 1.0 / (1.0 + (-gate).exp()));
            out.iter_mut().zip(y).for_each(|(out, y)| *out += gate * y);
        }
        Ok(())
    }
}

fn layouts<'a>(operands: &[Operand<'a>], inputs: &mut Vec<&'a Array>) -> Result<Vec<MatrixLayout>> {
    operands.iter().map(|operand| MatrixLayout::new(operand, inputs)).collect()
}

fn read<'a>(layouts: &[MatrixLayout], inputs: &[Input<'a>]) -> Result<Vec<Projection<'a>>> {
    layouts.iter().map(|layout| layout.read(inputs)).collect()
}
