-- Stands in front of every script. Time is Redis's own, in whole milliseconds: the workers' clocks are never compared.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local ENDED = { completed = true, failed = true, cancelled = true, expired = true }

-- Milliseconds since this store was new, or may have lost writes; one that nobody has looked at yet is new.
local function sure_for(tick_key, now)
  local since = tonumber(redis.call('HGET', tick_key, 'unsure_at'))
  return since and now - since or 0
end
