//! The test bed: a real control plane, a real kubelet, and the agent under test, as values that clean up after
//! themselves.
//!
//! ```no_run
//! use pintle_test_support::{BootstrapCredential, ControlPlane, Options};
//!
//! let control_plane = ControlPlane::start(Options { cluster_signing_duration: "30s".into(), ..Options::default() });
//! let kubeconfig = control_plane.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
//! println!("{}", control_plane.kubectl(&["get", "nodes"]));
//! # drop(kubeconfig);
//! ```
//!
//! # Guarantees
//! - Nothing outlives the test. The kernel kills every process when the test process exits, for whatever reason, and
//!   every scratch directory is removed by then or shortly after.
//! - Tests that run in parallel do not interfere: every port and directory is reserved first.
//!
//! # Errors
//! Functions panic with a message that says what they waited for, and with the end of the relevant log: if the test
//! bed does not work, the test fails. `./tests/run` sets the environment variable `PINTLE_TEST_CLUSTER` to the path
//! of the multi-call binary built from `tests/cluster`, and `PINTLE_TEST_CLUSTER_1_21` to that of an old release.

mod agent;
mod audit;
mod authority;
mod bootstrap;
mod clock;
mod condition;
mod control_plane;
mod faulty_module;
mod forward;
mod kubeconfig;
mod kubelet;
mod load;
mod node;
mod options;
mod permissions;
mod ports;
mod private_key_search;
mod process;
mod programs;
mod request;
mod scratch;
mod swtpm;
mod token;

pub use agent::{Agent, AgentCommand};
pub use audit::AuditEvent;
pub use authority::{Authority, CertificatePair};
pub use bootstrap::BootstrapCredential;
pub use clock::MovableClock;
pub use condition::{eventually, holds_within};
pub use control_plane::{ControlPlane, Identity};
pub use faulty_module::faulty_module;
pub use forward::forward;
pub use kubelet::{Kubelet, KubeletOptions};
pub use load::{Load, LoadCount, LoadReport};
pub use node::{Answer, Node, Pair, serial_text};
pub use options::{Options, Release, StaticToken};
pub use ports::ReservedPorts;
pub use private_key_search::{Finding, private_key_structures, private_keys_in_files, private_keys_in_memory};
pub use process::{ProcessCommand, Service, TestProcess};
pub use programs::{cluster_binary, kubectl};
pub use request::SubmittedRequest;
pub use scratch::ScratchDirectory;
pub use swtpm::{ResourceManager, Swtpm};
pub use token::{Token, TokenKey, TokenModule};
