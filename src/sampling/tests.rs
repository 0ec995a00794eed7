//! Sampling against plain arithmetic on the host.

use mlx_rs::Array;

use super::*;
use crate::mlx::{self, Device};

const VOCAB: usize = 16;

fn on_cpu(body: impl FnOnce() -> Result<()>) {
    mlx::init().unwrap();
    mlx::on_device(Device::Cpu, body).unwrap();
}

/// Logits whose order is a fixed shuffle of the token ids.
fn logits() -> Vec<f32> {
    (0..VOCAB).map(|i| ((i * 7 + 3) % VOCAB) as f32 * 0.3).collect()
}

fn array(rows: &[Vec<f32>]) -> Array {
    let flat: Vec<f32> = rows.concat();
    Array::from_slice(&flat, &[rows.len() as i32, VOCAB as i32])
}

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::default() }
}

/// `count` draws from the same logits.
fn draws(params: SamplingParams, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    let logits = array(&[logits()]);
    let mut sampler = Sampler::new(params, prompt, VOCAB);
    (0..count).map(|_| Ok(sample(&Backend::Mlx, &logits, &mut [&mut sampler])?.tokens.as_slice::<u32>()[0])).collect()
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let best = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f32 = logits.iter().map(|l| (l - best).exp()).sum();
    logits.iter().map(|l| (l - best).exp() / sum).collect()
}

/// Token ids, most likely first.
fn ranking(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    ids
}

#[test]
fn zero_temperature_takes_the_best_token() {
    on_cpu(|| {
        for temperature in [0.0, 1e-39] {
            let greedy = draws(SamplingParams { temperature, top_p: 0.1, ..SamplingParams::default() }, &[], 3)?;
            assert_eq!(greedy, [ranking(&logits())[0]; 3]);
        }
        Ok(())
    });
}

#[test]
fn a_seed_fixes_the_draws_and_another_changes_them() {
    on_cpu(|| {
        let first = draws(params(), &[], 24)?;
        assert_eq!(draws(params(), &[], 24)?, first);
        assert_ne!(draws(SamplingParams { seed: 8, ..params() }, &[], 24)?, first);
        Ok(())
    });
}

#[test]
fn a_row_draws_the_same_alone_and_in_any_batch() {
    on_cpu(|| {
        let kinds = [
            params(),
            SamplingParams { top_p: 0.6, seed: 3, ..params() },
            SamplingParams { temperature: 0.0, ..params() },
            SamplingParams { min_p: 0.2, top_k: 5, seed: 4, ..params() },
            SamplingParams { repetition_penalty: 1.4, frequency_penalty: 0.4, seed: 5, ..params() },
        ];
        let mut samplers: Vec<_> = kinds.iter().map(|kind| Sampler::new(kind.clone(), &[1, 2], VOCAB)).collect();
        let batch = array(&vec![logits(); kinds.len()]);
        let mut together: Vec<Vec<u32>> = vec![Vec::new(); kinds.len()];
        for _ in 0..12 {
            let mut rows: Vec<&mut Sampler> = samplers.iter_mut().collect();
            let drawn = sample(&Backend::Mlx, &batch, &mut rows)?;
            for (row, token) in drawn.tokens.as_slice::<u32>().iter().enumerate() {
                together[row].push(*token);
            }
        }
        for (kind, tokens) in kinds.into_iter().zip(together) {
            assert_eq!(draws(kind.clone(), &[1, 2], 12)?, tokens, "{kind:?}");
        }
        Ok(())
    });
}

#[test]
fn draws_follow_the_distribution() {
    on_cpu(|| {
        let count = 3000;
        let tempered: Vec<f32> = logits().iter().map(|l| l / 0.7).collect();
        let expected = softmax(&tempered);
        let mut seen = [0f32; VOCAB];
        for token in draws(SamplingParams { temperature: 0.7, ..params() }, &[], count)? {
            seen[token as usize] += 1.0 / count as f32;
        }
        for (token, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
            // Five standard deviations of a binomial share.
            let allowed = 5.0 * (expected * (1.0 - expected) / count as f32).sqrt() + 1e-3;
            assert!((seen - expected).abs() < allowed, "token {token}: {seen} instead of {expected}");
        }
        Ok(())
    });
}

/// The distinct tokens that many draws give, most likely first.
fn support(params: SamplingParams) -> Result<Vec<u32>> {
    let drawn: std::collections::HashSet<u32> = draws(params, &[], 400)?.into_iter().collect();
    Ok(ranking(&logits()).into_iter().filter(|token| drawn.contains(token)).collect())
}

#[test]
fn filters_keep_exactly_what_they_should() {
    on_cpu(|| {
        let ranked = ranking(&logits());
        let probabilities = softmax(&logits());
        let hot = SamplingParams { temperature: 1.0, ..params() };
        assert_eq!(support(SamplingParams { top_k: 3, ..hot.clone() })?, ranked[..3]);
        assert_eq!(support(SamplingParams { top_k: 1, ..hot.clone() })?, ranked[..1]);
        let shares = probabilities.clone();
        let nucleus = |mass: f32| {
            let mut before = 0.0;
            let shares = shares.clone();
            ranked.iter().take_while(move |token| {
                let keep = before < mass;
                before += shares[**token as usize];
                keep
            })
        };
        let expected: Vec<u32> = nucleus(0.5).copied().collect();
        assert_eq!(support(SamplingParams { top_p: 0.5, ..hot.clone() })?, expected);
        let best = probabilities[ranked[0] as usize];
        let expected: Vec<u32> = ranked.iter().copied().filter(|t| probabilities[*t as usize] >= 0.35 * best).collect();
        assert_eq!(support(SamplingParams { min_p: 0.35, ..hot.clone() })?, expected);
        assert_eq!(support(SamplingParams { top_p: 1e-6, ..hot.clone() })?, ranked[..1]);
        // Of the best three, the first two have 70 % of what the three have together, but only 37 % of all.
        let three: f32 = ranked[..3].iter().map(|t| probabilities[*t as usize]).sum();
        let two: f32 = ranked[..2].iter().map(|t| probabilities[*t as usize]).sum();
        let mass = 0.99 * two / three;
        assert!(mass > two, "the case does not tell the two readings apart");
        assert_eq!(support(SamplingParams { top_k: 3, top_p: mass, ..hot })?, ranked[..2]);
        Ok(())
    });
}

#[test]
fn bias_and_penalties_move_the_choice() {
    on_cpu(|| {
        let ranked = ranking(&logits());
        let (best, second) = (ranked[0], ranked[1]);
        let greedy = SamplingParams::default();
        let biased = SamplingParams { logit_bias: vec![(best, -100.0)], ..greedy.clone() };
        assert_eq!(draws(biased, &[], 1)?, [second]);
        // The best token's logit is 4.5, the second's 4.2: each occurrence costs 0.2.
        let frequent = SamplingParams { frequency_penalty: 0.2, ..greedy.clone() };
        assert_eq!(draws(frequent, &[], 4)?, [best, best, second, best]);
        let present = SamplingParams { presence_penalty: 2.0, ..greedy.clone() };
        assert_eq!(draws(present, &[best], 2)?, [best, second], "a prompt token is not an answer token");
        let repeated = SamplingParams { repetition_penalty: 1.5, ..greedy };
        assert_eq!(draws(repeated.clone(), &[best], 1)?, [second]);
        assert_eq!(draws(repeated, &[], 2)?, [best, second]);
        Ok(())
    });
}

#[test]
fn a_repetition_penalty_lowers_negative_logits_too() {
    on_cpu(|| {
        let mut values = vec![-5.0f32; VOCAB];
        (values[3], values[4]) = (-1.0, -1.2);
        let params = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, &[3], VOCAB);
        let drawn = sample(&Backend::Mlx, &array(&[values]), &mut [&mut sampler])?;
        assert_eq!(drawn.tokens.as_slice::<u32>(), [4]);
        Ok(())
    });
}

#[test]
fn logprobs_are_those_of_the_model() {
    on_cpu(|| {
        let ranked = ranking(&logits());
        let params =
            SamplingParams { logit_bias: vec![(ranked[0], -100.0)], top_logprobs: Some(3), ..Default::default() };
        let mut samplers = [Sampler::new(params.clone(), &[], VOCAB), Sampler::new(params, &[], VOCAB)];
        let [first, second] = &mut samplers;
        let drawn = sample(&Backend::Mlx, &array(&[logits(), logits()]), &mut [first, second])?;
        let report = drawn.logprobs.expect("asked for");
        let expected: Vec<f32> = softmax(&logits()).iter().map(|p| p.ln()).collect();
        let close = |a: f32, b: f32| (a - b).abs() < 1e-5;
        // As the engine reads them, which takes runs of memory only.
        let own = report.drawn.try_as_slice::<f32>().unwrap();
        assert!(own.len() == 2 && own.iter().all(|own| close(*own, expected[ranked[1] as usize])));
        let (ids, values) = report.top.expect("asked for");
        let (ids, values) = (ids.try_as_slice::<u32>().unwrap(), values.try_as_slice::<f32>().unwrap());
        for (ids, values) in ids.chunks(3).zip(values.chunks(3)) {
            let mut found: Vec<_> = ids.iter().zip(values).collect();
            found.sort_by(|a, b| b.1.total_cmp(a.1));
            for ((id, value), rank) in found.into_iter().zip(&ranked) {
                assert!(id == rank && close(*value, expected[*rank as usize]), "{id} {value}");
            }
        }
        Ok(())
    });
}

#[test]
fn the_cpu_kernel_takes_the_same_parameters() {
    let cpu = Backend::Cpu(crate::kernels::Cpu::new(Some(1), Default::default()));
    on_cpu(|| {
        let one = |params: SamplingParams| -> Result<[u32; 2]> {
            let draw = |backend: &Backend| -> Result<u32> {
                let mut sampler = Sampler::new(params.clone(), &[3], VOCAB);
                Ok(sample(backend, &array(&[logits()]), &mut [&mut sampler])?.tokens.as_slice::<u32>()[0])
            };
            Ok([draw(&Backend::Mlx)?, draw(&cpu)?])
        };
        // Parameters that leave a single token, whatever the noise.
        for params in [
            SamplingParams::default(),
            SamplingParams { temperature: 5.0, top_k: 1, ..params() },
            SamplingParams { temperature: 5.0, min_p: 1.0, ..params() },
            SamplingParams { temperature: 5.0, top_p: 1e-6, ..params() },
            SamplingParams { logit_bias: vec![(4, 100.0)], ..params() },
        ] {
            let [composed, kernel] = one(params.clone())?;
            assert_eq!(kernel, composed, "{params:?}");
        }
        // The noise follows the seed and the number of draws.
        let draws = |seed: u64| -> Result<Vec<u32>> {
            let mut sampler = Sampler::new(SamplingParams { seed, ..params() }, &[3], VOCAB);
            let logits = array(&[logits()]);
            (0..20).map(|_| Ok(sample(&cpu, &logits, &mut [&mut sampler])?.tokens.as_slice::<u32>()[0])).collect()
        };
        assert_eq!(draws(1)?, draws(1)?);
        assert_ne!(draws(1)?, draws(2)?);
        assert!(draws(1)?.iter().any(|&token| token != draws(1).unwrap()[0]), "every draw has the same noise");
        Ok(())
    });
}

/// Draws of three rows, of which the second may draw `allowed` only where a bit of `restricted` says so.
fn draws_beside(backend: &Backend, allowed: &[u32], restricted: u32) -> Result<Vec<Vec<u32>>> {
    let kinds = [
        SamplingParams { top_p: 0.7, ..params() },
        SamplingParams { temperature: 0.8, top_k: 4, seed: 2, ..params() },
        SamplingParams { temperature: 0.0, repetition_penalty: 1.3, ..params() },
    ];
    let mut samplers: Vec<_> = kinds.into_iter().map(|kind| Sampler::new(kind, &[3], VOCAB)).collect();
    let word = allowed.iter().fold(0, |word, token| word | 1 << token);
    (0..16)
        .map(|step| {
            if restricted >> step & 1 == 1 {
                samplers[1].restrict(&[word]);
            }
            let mut rows: Vec<&mut Sampler> = samplers.iter_mut().collect();
            Ok(sample(backend, &array(&vec![logits(); 3]), &mut rows)?.tokens.as_slice::<u32>().to_vec())
        })
        .collect()
}

#[test]
fn a_mask_holds_for_one_draw_of_one_row() {
    let cpu = Backend::Cpu(crate::kernels::Cpu::new(Some(1), Default::default()));
    on_cpu(|| {
        let ranked = ranking(&logits());
        // Tokens that top-k would never keep.
        let allowed = &ranked[VOCAB - 3..];
        for backend in [&Backend::Mlx, &cpu] {
            let free = draws_beside(backend, allowed, 0)?;
            let masked = draws_beside(backend, allowed, 0b1010_1111_0000_0101)?;
            for (step, (free, masked)) in free.iter().zip(&masked).enumerate() {
                assert_eq!((free[0], free[2]), (masked[0], masked[2]), "a neighbour's draw changed in step {step}");
                match 0b1010_1111_0000_0101 >> step & 1 {
                    1 => assert!(allowed.contains(&masked[1]), "{masked:?} in step {step}"),
                    _ => assert_eq!(free[1], masked[1], "the mask of another step holds in step {step}"),
                }
                assert!(!allowed.contains(&free[1]), "the case shows nothing");
            }
            // Greedy: the best of what is allowed.
            let mut greedy = Sampler::new(SamplingParams::default(), &[], VOCAB);
            greedy.restrict(&[1 << allowed[2] | 1 << allowed[1]]);
            let drawn = sample(backend, &array(&[logits()]), &mut [&mut greedy])?;
            assert_eq!(drawn.tokens.as_slice::<u32>(), [allowed[1]]);
        }
        Ok(())
    });
}
