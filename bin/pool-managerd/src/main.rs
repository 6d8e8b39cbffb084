//! `pool-managerd`: the node daemon. Reads its configuration whole, then hands over.

mod api;
mod bootstrap;
mod config;
mod logs;
mod models;
mod registry;

use std::process::ExitCode;

fn main() -> ExitCode {
    let config = match config::read() {
        config::Read::Run(config) => config,
        config::Read::Exit(code) => return code,
    };
    let logs = daemon_kit::telemetry::init(config.log_format, &config.log);
    daemon_kit::serve::block_on(logs, bootstrap::run(*config))
}
