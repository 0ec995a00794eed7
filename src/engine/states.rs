//! The states of recurrent layers, in slots that the scheduler hands out.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::scheduler::Run;
use super::shape::Shape;
use crate::cache::rows::{LayerRows, RowBuffer, RowLayout, RowType};
use crate::cache::snapshots::{SlotCopy, SlotId};
use crate::cache::{places_filled_with, row_type};
use crate::error::{Error, Result};
use crate::kernels::{Backend, StatePlacement, StateRun, read_array};
use crate::mlx;
use crate::nn::{StateLayout, StatePools};

/// States of all layers that have some.
#[derive(Debug)]
pub struct States {
    backend: Backend,
    pools: Vec<StatePools>,
    slots: usize,
    /// Of a slot, in all layers.
    slot_bytes: usize,
}

impl States {
    /// `slots` slots for layers that keep `layouts` of a sequence.
    pub fn new(backend: &Backend, layouts: &[StateLayout], slots: usize) -> Result<Self> {
        let pools = layouts.iter().map(|layout| StatePools::new(backend.clone(), layout, slots));
        let slot_bytes = layouts.iter().map(StateLayout::slot_bytes).sum();
        Ok(Self { backend: backend.clone(), pools: pools.collect::<Result<_>>()?, slots, slot_bytes })
    }

    /// Whether no layer has a state.
    pub fn is_empty(&self) -> bool {
        self.pools.is_empty()
    }

    /// The states of each layer.
    pub fn pools(&mut self) -> &mut [StatePools] {
        &mut self.pools
    }

    /// Slots that there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of a slot in all layers.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes of the largest array: beside the one that takes its place while the number of slots changes.
    pub fn largest(&self) -> usize {
        self.pools.iter().flat_map(StatePools::arrays).map(Array::nbytes).max().unwrap_or(0)
    }

    /// Changes the number of slots; those behind a smaller number are lost. No step may be on its way. After an error all
    /// layers have as many as before, or more.
    pub fn resize(&mut self, slots: usize) -> Result<()> {
        self.pools.iter_mut().try_for_each(|pools| pools.resize(slots))?;
        self.slots = slots;
        Ok(())
    }

    /// Where the states of a step's sequences are, and what is copied there first.
    pub fn place(&self, runs: &[Run], copies: &[SlotCopy], shape: &Shape) -> Result<Arc<StatePlacement>> {
        if self.is_empty() {
            return Ok(Arc::default());
        }
        let placed = |(run, &row): (&Run, &usize)| {
            let slot = run.state.ok_or_else(|| Error::internal("a run without a state"))?;
            Ok(StateRun { rows: row..row + run.tokens(), slot, begins: run.start == 0 })
        };
        let mut runs = runs.iter().zip(&shape.first).map(placed).collect::<Result<Vec<_>>>()?;
        runs.sort_by_key(|run| run.rows.start);
        Ok(Arc::new(StatePlacement { copies: copies.iter().map(|copy| (copy.from, copy.to)).collect(), runs }))
    }

    /// What other tiers keep of a state: layers are counted among those that have one. `None` without states, and where they
    /// have number formats that no tier takes.
    pub fn row_layout(&self) -> Option<Arc<RowLayout>> {
        let types = |pools: &StatePools| {
            let arrays = &pools.layout().arrays;
            let kept = row_type(arrays.first()?.1)?;
            let state = arrays.get(1).map_or(Some(RowType::F32), |(_, dtype)| row_type(*dtype))?;
            (arrays.len() <= 2).then_some((kept, state))
        };
        let (dtype, state) = types(self.pools.first()?)?;
        if !self.pools.iter().all(|pools| types(pools) == Some((dtype, state))) {
            return None;
        }
        let sizes = |array: Option<&(Vec<usize>, Dtype)>| match array {
            Some((shape, _)) => (shape[0], shape[1..].iter().product()),
            None => (0, 0),
        };
        let layers = self.pools.iter().enumerate().map(|(layer, pools)| {
            let arrays = &pools.layout().arrays;
            LayerRows { layer, keys: sizes(arrays.first()), values: sizes(arrays.get(1)) }
        });
        Some(Arc::new(RowLayout { dtype, state: Some(state), layers: layers.collect() }))
    }

    /// Copies a state to the one row of `to`. No step may be on its way that writes it.
    pub fn read(&self, slot: SlotId, to: &mut RowBuffer) -> Result<()> {
        if let Backend::Cpu(cpu) = &self.backend {
            for (at, pools) in self.pools.iter().enumerate() {
                let (kept, state) = to.rows_mut(at, 0..1);
                let parts = pools.arrays().zip([kept, state]).map(|(array, to)| (array, slot as usize * to.len(), to));
                cpu.read_parts(parts.collect())?;
            }
            return Ok(());
        }
        let place = mlx::indices(&[slot as i32])?;
        let gathered = self.pools.iter().flat_map(StatePools::arrays).map(|array| array.take_axis(&place, 0));
        let gathered = gathered.collect::<std::result::Result<Vec<_>, _>>()?;
        mlx_rs::transforms::eval(&gathered)?;
        let mut gathered = gathered.iter();
        for (at, pools) in self.pools.iter().enumerate() {
            let (kept, state) = to.rows_mut(at, 0..1);
            for (to, array) in [kept, state].into_iter().zip(gathered.by_ref().take(pools.layout().arrays.len())) {
                read_array(array, to)?;
            }
        }
        Ok(())
    }

    /// Copies the one row of `from` to a slot. No step may be on its way.
    pub fn write(&mut self, slot: SlotId, from: &RowBuffer) -> Result<()> {
        for (at, pools) in self.pools.iter_mut().enumerate() {
            let (kept, state) = from.rows(at, 0..1);
            let mut rows = [kept, state].into_iter();
            if let Backend::Cpu(cpu) = &self.backend {
                let parts = pools.arrays().zip(rows).map(|(array, from)| (array, slot as usize * from.len(), from));
                cpu.write_parts(parts.collect())?;
                continue;
            }
            let place = mlx::indices(&[slot as i32])?;
            pools.replace(|pool| {
                let update = places_filled_with(&pool, 1, rows.next().unwrap_or_default())?;
                mlx::scatter(pool, &[&place], &update)
            })?;
            mlx_rs::transforms::eval(pools.arrays())?;
        }
        Ok(())
    }
}
