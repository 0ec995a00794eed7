//! What growing the pools costs, and batches of texts. MLX counts for the whole process, so these tests have their own, and take
//! turns.

use std::path::Path;
use std::sync::Mutex;

use mlx_rs::Dtype;
use omlx::cache::{GroupKind, KvLayout, Pages};
use omlx::config::ModelConfig;
use omlx::error::Result;
use omlx::kernels::{Backend, Cpu, Precision};
use omlx::mlx::{self, Device};
use omlx::models::encoder::{BatchPlan, EmbeddingModel};
use omlx::text::TextTokens;
use omlx::weights::Weights;
use serde_json::{Value, json};

const LAYERS: usize = 6;

/// Peak bytes above the present use while `body` runs.
fn extra_peak(body: impl FnOnce() -> Result<()>) -> Result<usize> {
    let before = mlx_rs::memory::active_memory()?;
    mlx_rs::memory::reset_peak_memory()?;
    body()?;
    Ok(mlx_rs::memory::peak_memory()?.saturating_sub(before))
}

/// One test at a time.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn resizing_keeps_one_layer_twice() {
    let _turn = TURN.lock();
    mlx::init().unwrap();
    resizing_with(&Backend::Mlx);
    resizing_with(&Backend::Cpu(Cpu::new(Some(2), Precision::Fast)));
}

fn resizing_with(backend: &Backend) {
    let outcome = mlx::on_device(Device::Cpu, || {
        let layout = KvLayout::new(&[(GroupKind::Full, (1, 4096), (1, 4096)); LAYERS], Dtype::Float32);
        let mut pages = Pages::new(backend.clone(), &layout, 16)?;
        let resize = |pages: &mut Pages, blocks: usize| {
            pages.resize(&[blocks]);
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

#[test]
fn batches_of_texts_take_what_was_reckoned() {
    let _turn = TURN.lock();
    mlx::init().unwrap();
    let layered = |hidden: usize, inner: usize, layers: usize| {
        json!({ "model_type": "bert", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": hidden / 32, "vocab_size": 100, "max_position_embeddings": 2048, "type_vocab_size": 2,
            "hidden_act": "gelu", "layer_norm_eps": 1e-12 })
    };
    let bert = |hidden: usize, inner: usize| layered(hidden, inner, 2);
    let modern = json!({ "model_type": "modernbert", "hidden_size": 384, "intermediate_size": 576, "num_hidden_layers": 4,
        "num_attention_heads": 12, "vocab_size": 100, "max_position_embeddings": 2048, "global_attn_every_n_layers": 3,
        "local_attention": 128, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "norm_eps": 1e-5 });
    let backend = Backend::Cpu(Cpu::new(Some(2), Precision::Fast));
    for (config, lengths) in [
        (bert(384, 1536), vec![128; 16]),
        (layered(384, 1536, 12), vec![64; 8]),
        (bert(384, 1536), (16..80).collect()),
        (bert(128, 2048), vec![1; 512]),
        (bert(384, 1536), vec![2048]),
        (modern.clone(), vec![2048]),
        (modern.clone(), (16..80).collect()),
    ] {
        batch_takes(&backend, &config, &lengths);
    }
}

fn batch_takes(backend: &Backend, config: &Value, lengths: &[usize]) {
    let outcome = mlx::on_device(Device::Cpu, || {
        let config = ModelConfig::from_value(config.clone())?;
        let plan = BatchPlan::new(&config, Device::Cpu)?;
        let weights = Weights::random(&config, Some(Dtype::Float32)).computed_by(backend.clone());
        let model = EmbeddingModel::load(Path::new("."), &config, weights)?;
        let text = |&n: &usize| TextTokens { ids: vec![5; n], types: vec![0; n], truncated: false };
        let texts: Vec<TextTokens> = lengths.iter().map(text).collect();
        model.encode(&texts[..1])?;
        let tokens: usize = lengths.iter().sum();
        let peak = extra_peak(|| model.encode(&texts).map(drop))?;
        let reckoned = plan.bytes(tokens);
        println!(
            "{} texts, {tokens} tokens: {peak} bytes, reckoned {reckoned}: {:.2}",
            lengths.len(),
            peak as f64 / reckoned as f64
        );
        assert!(peak <= reckoned, "{peak} bytes, {reckoned} were reckoned, for {} texts", lengths.len());
        assert!(peak > reckoned / 20, "{peak} bytes say little about {reckoned}");
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn results_are_not_far_ahead() {
    let _turn = TURN.lock();
    mlx::init().unwrap();
    let cpu = Cpu::new(Some(2), Precision::Fast);
    let outcome = mlx::on_device(Device::Cpu, || {
        let [rows, width] = [4096, 256];
        let (x, weight) = (mlx_rs::ops::ones::<f32>(&[rows, width])?, mlx_rs::ops::ones::<f32>(&[width])?);
        mlx_rs::transforms::eval([&x, &weight])?;
        let chain = |limit: &dyn Fn()| {
            let mut y = x.clone();
            for _ in 0..40 {
                y = cpu.rms_norm(&y, &weight, 1e-5)?;
            }
            limit();
            Ok(y.eval()?)
        };
        let each = x.nbytes();
        let near = extra_peak(|| chain(&mlx::limit_ahead))?;
        assert!(near <= 10 * each, "{near} bytes ahead by results of {each}");
        // Negative control: without a limit that is near.
        let far = || drop(mlx_rs::memory::set_memory_limit(1 << 40));
        assert!(extra_peak(|| chain(&far))? > 20 * each, "this test sees nothing");
        Ok(())
    });
    outcome.unwrap();
}
