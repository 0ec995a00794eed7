//! Checkpoints whose experts are not stacked: what they give is what the same numbers give in stacks.

use super::*;

/// Bytes of expert `at` of a stack, and the shape of one.
fn one((dtype, shape, bytes): &(FileDtype, Vec<usize>, Vec<u8>), at: usize) -> (FileDtype, Vec<usize>, Vec<u8>) {
    let size = bytes.len() / EXPERTS;
    (*dtype, shape[1..].to_vec(), bytes[at * size..(at + 1) * size].to_vec())
}

/// Rows of gate and up in one tensor: `run` rows of one, then as many of the other.
fn joined(gate: &Part, up: &Part, run: usize) -> Part {
    let mut shape = gate.1.clone();
    let row = gate.2.len() / (shape[0] * shape[1]);
    shape[1] *= 2;
    let runs = gate.2.chunks(run * row).zip(up.2.chunks(run * row));
    (gate.0, shape, runs.flat_map(|(gate, up)| [gate, up].concat()).collect())
}

/// `[experts, rows, columns]` of f32 with the last axes exchanged.
fn transposed((dtype, shape, bytes): Part) -> Part {
    let (rows, columns) = (shape[1], shape[2]);
    let at = |expert: usize, row: usize, column: usize| 4 * ((expert * rows + row) * columns + column);
    let mut out = Vec::with_capacity(bytes.len());
    for expert in 0..EXPERTS {
        for column in 0..columns {
            for row in 0..rows {
                out.extend(&bytes[at(expert, row, column)..][..4]);
            }
        }
    }
    (dtype, vec![EXPERTS, columns, rows], out)
}

type Part = (FileDtype, Vec<usize>, Vec<u8>);

/// The same numbers stored otherwise.
fn same(what: &str, mixture: &Mixture, change: impl FnOnce(&mut Mixture)) {
    let mut other = mixture.clone();
    change(&mut other);
    assert_ne!(other.tensors.0.keys().collect::<Vec<_>>(), mixture.tensors.0.keys().collect::<Vec<_>>());
    let x = Random(9).floats(4 * HIDDEN, 1.0);
    for backend in backends() {
        let found = other.run(&backend, &x, None).unwrap();
        let error = difference(&found, &mixture.reference(&x, &x));
        assert!(error <= BOUND, "{what}, {}: off by {error:e}", backend.numerics());
    }
}

fn separate(mixture: &mut Mixture, names: [&str; 3]) {
    let tensors = &mut mixture.tensors;
    for (stacked, name) in mixture.spec.projections.into_iter().zip(names) {
        let prefix = format!("layer.{}.{stacked}.", mixture.spec.stacked);
        let found: Vec<String> = tensors.0.keys().filter(|key| key.starts_with(&prefix)).cloned().collect();
        for key in found {
            let part = tensors.part(&key);
            for expert in 0..EXPERTS {
                let name = format!("layer.experts.{expert}.{name}.{}", &key[prefix.len()..]);
                tensors.0.insert(name, one(&part, expert));
            }
        }
    }
}

#[test]
fn separate_experts_are_stacked() {
    let qwen = |format| Mixture::new(routers().swap_remove(0).1, format, Format::Affine(8));
    for format in [Format::Dense, Format::Affine(4), Format::Mxfp4] {
        same(&format!("separate, {format:?}"), &qwen(format), |mixture| separate(mixture, PROJECTIONS));
    }
    same("Mixtral's names", &qwen(Format::Dense), |mixture| separate(mixture, ["w1", "w3", "w2"]));
    let spec = ExpertsSpec { bias: true, ..routers().swap_remove(0).1 };
    let biased = Mixture::new(spec, Format::Dense, Format::Dense);
    same("with biases", &biased, |mixture| separate(mixture, PROJECTIONS));
    let (_, nemotron) = routers().into_iter().find(|(name, _)| *name == "nemotron_h").unwrap();
    let nemotron = Mixture::new(nemotron, Format::Dense, Format::Dense);
    same("without a gate", &nemotron, |mixture| separate(mixture, PROJECTIONS));
}

#[test]
fn joined_gates_are_taken_apart() {
    let take = |mixture: &mut Mixture| -> [Part; 3] {
        let stacked = mixture.spec.stacked;
        PROJECTIONS.map(|name| mixture.tensors.part(&format!("layer.{stacked}.{name}.weight")))
    };
    let mixture = |spec| Mixture::new(spec, Format::Dense, Format::Dense);
    let qwen = mixture(routers().swap_remove(0).1);
    for [both, down] in [["experts.gate_up_proj", "experts.down_proj"], ["input_linear.weight", "output_linear.weight"]]
    {
        same(both, &qwen, |mixture| {
            let [gate, up, last] = take(mixture);
            mixture.tensors.0.insert(format!("layer.{both}"), joined(&gate, &up, INNER));
            mixture.tensors.0.insert(format!("layer.{down}"), last);
        });
    }
    same("Gemma's path", &mixture(gemma()), |mixture| {
        let [gate, up, down] = take(mixture);
        mixture.tensors.0.insert("layer.experts.gate_up_proj".to_owned(), joined(&gate, &up, INNER));
        mixture.tensors.0.insert("layer.experts.down_proj".to_owned(), down);
    });
    let (_, llama) = routers().into_iter().find(|(name, _)| *name == "llama4").unwrap();
    same("transposed", &mixture(ExpertsSpec { transposed: true, ..llama }), |mixture| {
        let [gate, up, down] = take(mixture);
        let both = transposed(joined(&gate, &up, INNER));
        mixture.tensors.0.insert("layer.experts.gate_up_proj".to_owned(), both);
        mixture.tensors.0.insert("layer.experts.down_proj".to_owned(), transposed(down));
    });
}

/// Granite's: they stand beside the mixture, and a matrix has both gate and up, also where MLX's tools have packed it.
#[test]
fn shared_experts_stand_beside_and_are_taken_apart() {
    let joined_names = Some(["input_linear", "output_linear"]);
    let shared = SharedSpec { beside: true, joined: joined_names, ..SharedSpec::new("shared_mlp", 32) };
    for format in [Format::Dense, Format::Affine(4)] {
        let spec = ExpertsSpec { shared: Some(shared.clone()), ..spec(RouterSpec::softmax_of_chosen("router.layer")) };
        let mixture = Mixture::new(spec, format, Format::Affine(8));
        for whole in [true, false] {
            same(&format!("shared, {format:?}, {whole}"), &mixture, |mixture| {
                let tensors = &mut mixture.tensors;
                for kind in if format == Format::Dense { &["weight"][..] } else { &["weight", "scales", "biases"] } {
                    let [gate, up, down] =
                        PROJECTIONS.map(|name| tensors.part(&format!("layer.shared_mlp.{name}.{kind}")));
                    let (mut parts, mut names) = (vec![gate, up, down], PROJECTIONS.to_vec());
                    if whole {
                        let (dtype, mut shape, mut bytes) = parts.remove(0);
                        shape[0] *= 2;
                        bytes.extend(&parts[0].2);
                        parts[0] = (dtype, shape, bytes);
                        names = vec!["input_linear", "output_linear"];
                    }
                    for (name, part) in names.into_iter().zip(parts) {
                        tensors.0.insert(format!("shared_mlp.{name}.{kind}"), part);
                    }
                }
            });
        }
    }
}

#[test]
fn blocks_of_mxfp4_are_taken_apart() {
    let (_, spec) = routers().into_iter().find(|(name, _)| *name == "gpt_oss").unwrap();
    same("blocks", &Mixture::new(spec, Format::Mxfp4, Format::Affine(8)), |mixture| {
        let tensors = &mut mixture.tensors;
        let mut take = |part: &str| PROJECTIONS.map(|name| tensors.part(&format!("layer.experts.{name}.{part}")));
        let blocks = |(_, shape, bytes): Part| (FileDtype::U8, vec![shape[0], shape[1], shape[2] / 4, 16], bytes);
        let parts = [("blocks", take("weight").map(blocks)), ("scales", take("scales")), ("bias", take("bias"))];
        for (name, [gate, up, down]) in parts {
            tensors.0.insert(format!("layer.experts.gate_up_proj_{name}"), joined(&gate, &up, 1));
            tensors.0.insert(format!("layer.experts.down_proj_{name}"), down);
        }
    });
}

#[test]
fn what_is_missing_is_named() {
    let good = Mixture::new(routers().swap_remove(0).1, Format::Dense, Format::Dense);
    for gone in ["layer.gate.weight", "layer.switch_mlp.up_proj.weight", "layer.switch_mlp.down_proj.weight"] {
        let mut bad = good.clone();
        bad.tensors.part(gone);
        let error = bad.run(&Backend::Mlx, &[0.0; HIDDEN], None).unwrap_err();
        assert!(error.message().contains(gone), "{error}");
    }
    let mut bad = good.clone();
    separate(&mut bad, PROJECTIONS);
    bad.tensors.part("layer.experts.5.gate_proj.weight");
    let error = bad.run(&Backend::Mlx, &[0.0; HIDDEN], None).unwrap_err();
    assert!(error.message().contains("layer.experts.5.gate_proj"), "{error}");
    for (experts, per_token) in [(EXPERTS, 0), (EXPERTS, EXPERTS + 1), (0, 0)] {
        let mut bad = good.clone();
        bad.spec = ExpertsSpec { experts, per_token, ..bad.spec };
        assert!(bad.run(&Backend::Mlx, &[0.0; HIDDEN], None).is_err(), "{per_token} of {experts}");
    }
}
