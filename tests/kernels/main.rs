//! Tests of the CPU kernels. The kernels are compiled into this program, without MLX, so that it can also be built for
//! other processors and run in an emulator.
//!
//! Properties run a few cases; `PROPTEST_CASES` sets how many.

#[path = "../../src/kernels/cpu/mod.rs"]
#[allow(dead_code)]
mod cpu;

mod attention;
mod case;
mod elementwise;
mod experts;
mod guard;
mod lanes;
mod matmul;
mod numbers;
mod recurrent;
mod reference;
mod routing;
mod sample;
mod texts;
mod threads;
