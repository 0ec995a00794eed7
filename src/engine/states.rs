//! The states of living sequences: which slot is whose.

use std::collections::HashMap;
use std::sync::Arc;

use super::scheduler::Run;
use super::sequence::SequenceId;
use super::shape::Shape;
use crate::error::{Error, Result};
use crate::kernels::{Backend, StatePlacement, StateRun};
use crate::nn::{StateLayout, StatePools};

/// States of all layers that have some, with a slot for each sequence.
#[derive(Debug)]
pub struct States {
    pools: Vec<StatePools>,
    slots: HashMap<SequenceId, u32>,
    free: Vec<u32>,
}

impl States {
    /// For layers that keep `layouts` of a sequence, and `sequences` of these at a time.
    pub fn new(backend: &Backend, layouts: &[StateLayout], sequences: usize) -> Result<Self> {
        let pools = layouts.iter().map(|layout| StatePools::new(backend.clone(), layout, sequences));
        let pools = pools.collect::<Result<_>>()?;
        Ok(Self { pools, slots: HashMap::new(), free: (0..sequences as u32).rev().collect() })
    }

    /// Whether no layer has a state.
    pub fn is_empty(&self) -> bool {
        self.pools.is_empty()
    }

    /// The states of each layer.
    pub fn pools(&mut self) -> &mut [StatePools] {
        &mut self.pools
    }

    /// Where the states of a step's sequences are, of which those that are new get slots.
    pub fn place(&mut self, runs: &[Run], shape: &Shape) -> Result<Arc<StatePlacement>> {
        if self.is_empty() {
            return Ok(Arc::default());
        }
        let mut placed = Vec::with_capacity(runs.len());
        for (run, &row) in runs.iter().zip(&shape.first) {
            let slot = match self.slots.get(&run.sequence) {
                Some(&slot) => slot,
                None => {
                    let slot = self.free.pop().ok_or_else(|| Error::internal("more sequences than states"))?;
                    self.slots.insert(run.sequence, slot);
                    slot
                }
            };
            placed.push(StateRun { rows: row..row + run.tokens(), slot, begins: run.start == 0 });
        }
        placed.sort_by_key(|run| run.rows.start);
        Ok(Arc::new(StatePlacement { copies: Vec::new(), runs: placed }))
    }

    /// A sequence has ended.
    pub fn remove(&mut self, id: SequenceId) {
        self.free.extend(self.slots.remove(&id));
    }
}
