//! Growing the pools costs one layer of extra memory. MLX counts for the whole process, so this test has its own.

use mlx_rs::Dtype;
use omlx::cache::{GroupKind, KvLayout, Pages};
use omlx::error::Result;
use omlx::kernels::{Backend, Cpu, Precision};
use omlx::mlx::{self, Device};

const LAYERS: usize = 6;

/// Peak bytes above the present use while `body` runs.
fn extra_peak(body: impl FnOnce() -> Result<()>) -> Result<usize> {
    let before = mlx_rs::memory::active_memory()?;
    mlx_rs::memory::reset_peak_memory()?;
    body()?;
    Ok(mlx_rs::memory::peak_memory()?.saturating_sub(before))
}

#[test]
fn resizing_keeps_one_layer_twice() {
    mlx::init().unwrap();
    resizing_with(&Backend::Mlx);
    resizing_with(&Backend::Cpu(Cpu::new(Some(2), Precision::Fast)));
}

fn resizing_with(backend: &Backend) {
    let outcome = mlx::on_device(Device::Cpu, || {
        let layers = vec![(1, 4096); LAYERS];
        let layout = KvLayout { groups: vec![GroupKind::Full], layers, dtype: Dtype::Float32 };
        let mut pages = Pages::new(backend.clone(), &layout, 16)?;
        let resize = |pages: &mut Pages, blocks: usize| {
            pages.resize(blocks);
            pages.resize_all()?;
            Ok(())
        };
        resize(&mut pages, 31)?;
        let before = pages.bytes();
        for blocks in [63, 31] {
            let peak = extra_peak(|| resize(&mut pages, blocks))?;
            // The new arrays of all layers, and beside them the old ones of one.
            let growth = pages.bytes().saturating_sub(before);
            let layer = pages.bytes().max(before) / LAYERS;
            assert!(peak <= growth + layer + layer / 4, "{peak} bytes more for {blocks} blocks; a layer is {layer}");
        }
        // Negative control: what the old arrays of all layers would cost.
        let mut old = Vec::new();
        let peak = extra_peak(|| {
            old.extend(pages.arrays().cloned());
            resize(&mut pages, 63)
        })?;
        let layer = pages.bytes() / LAYERS;
        assert!(peak > pages.bytes() - before + layer + layer / 4, "this test sees nothing");
        Ok(())
    });
    outcome.unwrap();
}
