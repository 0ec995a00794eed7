//! Raw bindings to MLX through its C interface, mlx-c: a drop-in for the published `mlx-sys` 0.7.0 that links a
//! prebuilt MLX 0.32.2. The README of this folder describes the build and its environment variables.

#![allow(non_upper_case_globals, non_camel_case_types, non_snake_case, unsafe_op_in_unsafe_fn)]
#![allow(clippy::all)]

/// Bits of an IEEE binary16 number. C passes it by pointer only.
#[repr(transparent)]
#[derive(Debug, Default, Copy, Clone)]
pub struct float16_t(pub u16);

/// Bits of a bfloat16 number. C passes it by pointer only.
pub type bfloat16_t = u16;

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
