-- Stands in front of every script. Time is Redis's own, in whole milliseconds: the workers' clocks are never compared.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local ENDED = { completed = true, failed = true, cancelled = true, expired = true }
