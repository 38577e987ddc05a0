//! Whose connection it is.

use std::{ops::Deref, sync::Arc};

use super::RouteError;
use crate::mesh::{GatewayAddress, MeshView, NamedGateway, Workload};

/// The pod that makes a connection. Fields of its workload read like its own.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub workload: Arc<Workload>,
    /// Whether the source of workloads has told it. Else it is a newcomer, made of what the node
    /// agent has proven and of what all pods of the node share (see [`Mesh::newcomer`]). Rules that
    /// need more of it than that say [`RouteError::Untold`], and its connection waits. They do if
    ///
    /// * the destination has a waypoint that the newcomer may be itself, and would pass by
    /// * it is in another network: the gateway is told who asks
    /// * it may be the pod itself, or the pod may have chosen the address to connect from: then it
    ///   depends on which addresses the pod has
    ///
    /// [`Mesh::newcomer`]: crate::mesh::Mesh::newcomer
    pub is_told: bool,
}

impl Deref for Source {
    type Target = Workload;

    fn deref(&self) -> &Workload {
        &self.workload
    }
}

impl Source {
    pub(crate) fn told(workload: Arc<Workload>) -> Self {
        Self { workload, is_told: true }
    }

    pub(crate) fn newcomer(workload: Workload) -> Self {
        Self { workload: Arc::new(workload), is_told: false }
    }

    /// Whether it is (one of) what `gateway` names.
    pub(super) fn is_gateway(
        &self,
        mesh: &MeshView<'_>,
        gateway: &GatewayAddress,
    ) -> Result<bool, RouteError> {
        if self.is_told {
            return Ok(super::is_gateway(mesh, &self.workload, gateway));
        }
        match mesh.gateway(gateway) {
            // A service has pods of its own namespace.
            Some(NamedGateway::Service(service)) if service.namespace != self.namespace => Ok(false),
            // That one is told.
            Some(NamedGateway::Workload(_)) => Ok(false),
            Some(NamedGateway::Service(_)) | None => Err(RouteError::Untold),
        }
    }

    /// An error if it is not told.
    pub(crate) fn must_be_told(&self) -> Result<(), RouteError> {
        if self.is_told { Ok(()) } else { Err(RouteError::Untold) }
    }
}
