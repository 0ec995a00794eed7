// swift-tools-version: 6.0
import PackageDescription

// The C functions. On Linux they come from an installed libomlx, found by pkg-config as "omlx"; on macOS from a framework that
// scripts/make-xcframework builds.
#if os(macOS)
let library: Target = .binaryTarget(name: "COMLX", path: "Frameworks/COMLX.xcframework")
#else
let library: Target = .systemLibrary(name: "COMLX", pkgConfig: "omlx")
#endif

let package = Package(
    name: "OMLX",
    platforms: [.macOS(.v14)],
    products: [
        .library(name: "OMLX", targets: ["OMLX"]),
        .library(name: "OMLXFoundationModels", targets: ["OMLXFoundationModels"]),
        .library(name: "OMLXServer", targets: ["OMLXServer"]),
        .executable(name: "omlx-menu-bar", targets: ["MenuBar"]),
    ],
    targets: [
        library,
        .target(name: "OMLX", dependencies: ["COMLX"]),
        // Empty where Apple's FoundationModels is not.
        .target(name: "OMLXFoundationModels", dependencies: ["OMLX"]),
        // Runs omlx-server as a child process; does not link libomlx.
        .target(name: "OMLXServer"),
        .executableTarget(name: "MenuBar", dependencies: ["OMLXServer"], path: "Examples/MenuBar"),
        // The sample of the README, word for word.
        .executableTarget(name: "Sample", dependencies: ["OMLX"], path: "Examples/Sample"),
    ]
)

// The tests ask /proc about their own process.
#if os(Linux)
package.targets += [
    .testTarget(name: "OMLXTests", dependencies: ["OMLX", "COMLX", "Sample"]),
    .testTarget(name: "OMLXServerTests", dependencies: ["OMLXServer"]),
]
#endif
