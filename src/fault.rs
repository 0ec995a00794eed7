//! Faults on demand, for tests: a panic or a mistake at a named point of one engine. Compiled to nothing outside unit
//! tests.

#[cfg(test)]
pub use armed::{arm, happens, in_graph, pause, point};

/// Panics if a test armed this point for the engine `id`.
#[cfg(not(test))]
#[inline(always)]
pub fn point(_name: &str, _id: &str) {}

/// Takes its time if a test armed this point for the engine `id`.
#[cfg(not(test))]
#[inline(always)]
pub fn pause(_name: &str, _id: &str) {}

/// Whether a test wants a mistake here in the engine `id`.
#[cfg(not(test))]
#[inline(always)]
pub fn happens(_name: &str, _id: &str) -> bool {
    false
}

/// `array` itself; in tests, a graph node that copies it and has a fault point of its own.
#[cfg(not(test))]
#[inline(always)]
pub fn in_graph(_name: &'static str, _id: &str, array: mlx_rs::Array) -> crate::error::Result<mlx_rs::Array> {
    Ok(array)
}

#[cfg(test)]
mod armed {
    use std::sync::Mutex;

    use mlx_rs::{Array, Dtype};

    use crate::error::Result;
    use crate::kernels::cpu::floats::FloatsMut;
    use crate::kernels::{CpuKernel, Input, Output, node};
    use crate::sync::lock;

    /// Armed points: name, engine, and how many passes are let through first.
    static ARMED: Mutex<Vec<(&'static str, String, usize)>> = Mutex::new(Vec::new());

    /// Arms `name` in the engine `id`: the pass after `passes` harmless ones goes wrong, once.
    pub fn arm(name: &'static str, id: &str, passes: usize) {
        lock(&ARMED).push((name, id.to_owned(), passes));
    }

    /// Panics if a test armed this point for the engine `id`.
    pub fn point(name: &str, id: &str) {
        if happens(name, id) {
            panic!("injected at {name}");
        }
    }

    /// Takes half a second for each time that a test armed this point for the engine `id`.
    pub fn pause(name: &str, id: &str) {
        while happens(name, id) {
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
    }

    /// Whether this pass is the one that a test armed for the engine `id`.
    pub fn happens(name: &str, id: &str) -> bool {
        let mut armed = lock(&ARMED);
        let Some(index) = armed.iter().position(|(n, i, _)| *n == name && i == id) else { return false };
        if armed[index].2 > 0 {
            armed[index].2 -= 1;
            return false;
        }
        armed.swap_remove(index);
        true
    }

    struct Copy {
        name: &'static str,
        id: String,
    }

    impl CpuKernel for Copy {
        fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
            point(self.name, &self.id);
            if let FloatsMut::F32(out) = outputs.remove(0).into_floats()? {
                out.copy_from_slice(&inputs[0].to_f32()?);
            }
            Ok(())
        }
    }

    /// `array`, f32, through a kernel with a fault point of its own.
    pub fn in_graph(name: &'static str, id: &str, array: Array) -> Result<Array> {
        if !lock(&ARMED).iter().any(|(n, i, _)| *n == name && i == id) {
            return Ok(array);
        }
        let shape = array.shape().to_vec();
        let id = id.to_owned();
        node(Copy { name, id }, &[&array.contiguous()?], &shape, Dtype::Float32)
    }
}
