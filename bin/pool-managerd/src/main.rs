//! `pool-managerd`: the node daemon. Reads its configuration whole, then hands over.

mod api;
mod bootstrap;
mod config;
mod registry;

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let config = match config::read() {
        config::Read::Run(config) => config,
        config::Read::Exit(code) => return code,
    };
    daemon_kit::telemetry::init(config.log_format, &config.log);
    match bootstrap::run(*config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            daemon_kit::telemetry::say_fatal(&error);
            ExitCode::FAILURE
        }
    }
}
